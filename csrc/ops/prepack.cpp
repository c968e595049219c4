#include "ops/prepack.h"

#include <vector>

#include "ops/integer.h"

namespace qk {
namespace {

WeightShape shape_for_prepack(const Tensor& zero, int64_t bits, const std::vector<int64_t>& sizes, int64_t groups) {
  check_storage_bits("prepack", bits);
  check(sizes.size() == 2 || sizes.size() == 4, "prepack", "shape", "[N, K] or [N, kh, kw, C / groups]",
        std::to_string(sizes.size()) + " sizes");
  for (int64_t size : sizes) check_size("prepack", "every size of shape", size, 1);
  check_size("prepack", "groups", groups, 1);
  const bool conv = sizes.size() == 4;
  const int64_t n = sizes[0];
  check(conv || groups == 1, "prepack", "groups", "1 for a weight [N, K]", groups);
  check(n % groups == 0, "prepack", "groups", "a divisor of N", groups);
  const int64_t k = conv ? product("prepack", "K", {sizes[1], sizes[2], sizes[3]}) : sizes[1];
  check_size("prepack", "K", k, 1);
  product("prepack", "shape", {n, k});
  check_dtype("prepack", "zero", zero, ScalarType::Int);
  const bool fits = (zero.dim() == 1 || zero.dim() == 2) && zero.size(0) == n &&
                    (zero.dim() == 1 || (zero.size(1) >= 1 && k % zero.size(1) == 0));
  if (!fits)
    fail("prepack", "zero",
         "int32 [" + std::to_string(n) + "], or [" + std::to_string(n) +
             ", groups along K] with groups that divide K = " + std::to_string(k),
         describe(zero));
  const int64_t k_groups = zero.dim() == 1 ? 1 : zero.size(1);
  check(k / k_groups <= longest_k(2, bits), "prepack", "K", "short enough for a sum in int32", k / k_groups,
        "Use zeros and steps by groups along K.");
  if (conv) return {n, sizes[1], sizes[2], sizes[3], groups, k_groups, static_cast<int>(bits)};
  return {n, 1, 1, k, 1, k_groups, static_cast<int>(bits)};
}

Algorithm parse_algorithm(const std::string& name) {
  if (name == "direct") return Algorithm::direct;
#if defined(QK_CUDA_OBJECT)
  fail("prepack", "algorithm", "direct on this device", name);
#else
  check(name == "winograd", "prepack", "algorithm", "direct or winograd", name);
  return Algorithm::winograd;
#endif
}

// Transformed weights must fit int8 (docs/winograd.md). Only the sum of the nine taps can leave it, and only with a
// zero at an end of the codes of 4 bits.
void check_winograd(const uint8_t* codes, const int32_t* zero, int64_t row_bytes, const WeightShape& s) {
  const char* advice = "Use algorithm=\"direct\".";
  check(s.bits <= 4, "prepack", "bits", "2 or 4 for winograd", s.bits, advice);
  check(s.kh == 3 && s.kw == 3, "prepack", "shape", "[N, 3, 3, C / groups] for winograd",
        std::to_string(s.kh) + " x " + std::to_string(s.kw), advice);
  check(!s.depthwise(), "prepack", "groups", "not depthwise for winograd", s.groups, advice);
  check(s.k_groups == 1, "prepack", "zero", "int32 [N] for winograd", "groups along K", advice);
  check(s.k() <= INT32_MAX / (4 * 63 * worst_weight(s.bits)), "prepack", "K",
        "short enough for a sum in int32 for winograd", s.k(), advice);
  for (int64_t n = 0; s.bits == 4 && n < s.n; ++n) {
    if (zero[n] > 0 && zero[n] < 15) continue;
    for (int64_t c = 0; c < s.c; ++c) {
      int sum = 0;
      for (int64_t k = c; k < s.k(); k += s.c) sum += (codes[n * row_bytes + k / 2] >> (k % 2 * 4) & 15) - zero[n];
      check(sum >= -128 && sum <= 127, "prepack", "the nine taps of a channel",
            "a sum of code - zero within int8 for winograd", sum, advice);
    }
  }
}

}  // namespace

template <void (*kernel)(const PrepackArgs&)>
Tensor prepack(const Tensor& packed, const Tensor& zero, int64_t bits, const std::vector<int64_t>& sizes,
               int64_t groups, const std::string& algorithm) {
  check_device("prepack", packed, {{"zero", &zero}});
  check_dtype("prepack", "packed", packed, ScalarType::Byte);
  WeightShape shape = shape_for_prepack(zero, bits, sizes, groups);
  shape.algorithm = parse_algorithm(algorithm);
  const int64_t row_bytes = packed_row_bytes(shape.k(), bits);
  if (packed.dim() != 2 || packed.size(0) != shape.n || packed.size(1) != row_bytes)
    fail("prepack", "packed",
         "uint8 [" + std::to_string(shape.n) + ", " + std::to_string(row_bytes) + "] for this shape", describe(packed),
         "Make it with torch.ops.qk.pack from codes [N, K].");
  const Tensor codes = dense(packed), zeros = dense(zero);
  check_zero_values("prepack", "zero", zeros, bits);
  const int32_t* z = zeros.const_data_ptr<int32_t>();
  if (bits == 8 && zeros.is_cpu())
    for (int64_t i = 0, all = zeros.numel(); i < all; ++i)
      check(z[i] == 128, "prepack", "zero", "128 for 8-bit weights", z[i], "Quantize 8-bit weights symmetrically.");
  if (shape.algorithm == Algorithm::winograd) check_winograd(codes.const_data_ptr<uint8_t>(), z, row_bytes, shape);
  const PackedLayout layout = QK_DEVICE::packed_layout(shape);
  Tensor out = torch::stable::new_empty(codes, {layout.bytes});
  QK_DEVICE_GUARD(packed);
  kernel({codes.const_data_ptr<uint8_t>(), z, out.mutable_data_ptr<uint8_t>(), row_bytes, shape, layout});
  return out;
}

QK_REGISTER(m) { m.impl("prepack", TORCH_BOX(&prepack<QK_DEVICE::prepack>)); }

}  // namespace qk
