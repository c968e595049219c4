#include "ops/quantize.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {
namespace {

// Whether x [images, ..., channels] lies in memory as [images, channels, ...], as a permuted NCHW tensor does.
bool lies_channels_first(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (last < 2 || x.numel() == 0) return false;
  int64_t stride = 1;
  const auto fits = [&](int64_t dim) {
    const bool ok = x.size(dim) == 1 || x.stride(dim) == stride;
    stride *= x.size(dim);
    return ok;
  };
  for (int64_t dim = last - 1; dim > 0; --dim)
    if (!fits(dim)) return false;
  return fits(last) && fits(0);
}

}  // namespace

template <void (*kernel)(const QuantizeArgs&), void (*kernel_transposed)(const QuantizeTransposedArgs&)>
Tensor quantize(const Tensor& x, const Tensor& step, const Tensor& zero, int64_t bits) {
  check_device("quantize", x, {{"step", &step}, {"zero", &zero}});
  check_dtype("quantize", "x", x, ScalarType::Float);
  check_bits("quantize", bits);
  const auto [rows, cols, steps, zeros] = check_rows("quantize", x, step, zero, bits);
  Tensor codes = torch::stable::new_empty(x, x.sizes(), ScalarType::Byte);
  QK_DEVICE_GUARD(x);
  if (rows == 1 && !x.is_contiguous() && lies_channels_first(x)) {
    const int64_t images = x.size(0), channels = x.size(x.dim() - 1);
    kernel_transposed({x.const_data_ptr<float>(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
                       codes.mutable_data_ptr<uint8_t>(), images, channels, cols / (images * channels),
                       static_cast<int>(bits)});
    return codes;
  }
  const Tensor xs = dense(x);
  kernel({xs.const_data_ptr<float>(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
          codes.mutable_data_ptr<uint8_t>(), rows, cols, static_cast<int>(bits)});
  return codes;
}

QK_REGISTER(m) { m.impl("quantize", TORCH_BOX((&quantize<QK_DEVICE::quantize, QK_DEVICE::quantize_transposed>))); }

}  // namespace qk
