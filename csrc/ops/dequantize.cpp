#include "ops/dequantize.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {
namespace {

// Whether codes [images, channels, ...] lie in memory as [images, ..., channels], as permuted NHWC codes do.
bool lies_channels_last(const Tensor& codes) {
  if (codes.dim() < 3 || codes.numel() == 0) return false;
  int64_t stride = 1;
  const auto fits = [&](int64_t dim) {
    const bool ok = codes.size(dim) == 1 || codes.stride(dim) == stride;
    stride *= codes.size(dim);
    return ok;
  };
  if (!fits(1)) return false;
  for (int64_t dim = codes.dim() - 1; dim > 1; --dim)
    if (!fits(dim)) return false;
  return fits(0);
}

}  // namespace

template <void (*kernel)(const DequantizeArgs&), void (*kernel_transposed)(const DequantizeTransposedArgs&)>
Tensor dequantize(const Tensor& codes, const Tensor& step, const Tensor& zero) {
  check_device("dequantize", codes, {{"step", &step}, {"zero", &zero}});
  check_dtype("dequantize", "codes", codes, ScalarType::Byte);
  const auto [rows, cols, steps, zeros] = check_rows("dequantize", codes, step, zero, 8, "codes");
  Tensor out = torch::stable::new_empty(codes, codes.sizes(), ScalarType::Float);
  QK_DEVICE_GUARD(codes);
  if (rows == 1 && !codes.is_contiguous() && lies_channels_last(codes)) {
    const int64_t images = codes.size(0), channels = codes.size(1);
    kernel_transposed({codes.const_data_ptr<uint8_t>(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
                       out.mutable_data_ptr<float>(), images, channels, cols / (images * channels)});
    return out;
  }
  const Tensor us = dense(codes);
  kernel({us.const_data_ptr<uint8_t>(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
          out.mutable_data_ptr<float>(), rows, cols});
  return out;
}

QK_REGISTER(m) {
  m.impl("dequantize", TORCH_BOX((&dequantize<QK_DEVICE::dequantize, QK_DEVICE::dequantize_transposed>)));
}

}  // namespace qk
