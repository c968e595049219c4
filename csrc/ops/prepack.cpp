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

}  // namespace

template <void (*kernel)(const PrepackArgs&)>
Tensor prepack(const Tensor& packed, const Tensor& zero, int64_t bits, const std::vector<int64_t>& sizes,
               int64_t groups, const std::string& algorithm) {
  check(algorithm == "direct", "prepack", "algorithm", "direct", algorithm);
  check_device("prepack", packed, {{"zero", &zero}});
  check_dtype("prepack", "packed", packed, ScalarType::Byte);
  const WeightShape shape = shape_for_prepack(zero, bits, sizes, groups);
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
  const PackedLayout layout = QK_DEVICE::packed_layout(shape);
  Tensor out = torch::stable::new_empty(codes, {layout.bytes});
  QK_DEVICE_GUARD(packed);
  kernel({codes.const_data_ptr<uint8_t>(), z, out.mutable_data_ptr<uint8_t>(), row_bytes, shape, layout});
  return out;
}

QK_REGISTER(m) { m.impl("prepack", TORCH_BOX(&prepack<QK_DEVICE::prepack>)); }

}  // namespace qk
