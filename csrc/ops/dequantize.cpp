#include "ops/dequantize.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {

template <void (*kernel)(const DequantizeArgs&)>
Tensor dequantize(const Tensor& codes, const Tensor& step, const Tensor& zero) {
  check_device("dequantize", codes, {{"step", &step}, {"zero", &zero}});
  check_dtype("dequantize", "codes", codes, ScalarType::Byte);
  const auto [rows, cols, steps, zeros] = check_rows("dequantize", codes, step, zero, 8, "codes");
  const Tensor us = dense(codes);
  Tensor out = torch::stable::new_empty(us, us.sizes(), ScalarType::Float);
  QK_DEVICE_GUARD(codes);
  kernel({us.const_data_ptr<uint8_t>(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
          out.mutable_data_ptr<float>(), rows, cols});
  return out;
}

QK_REGISTER(m) { m.impl("dequantize", TORCH_BOX(&dequantize<QK_DEVICE::dequantize>)); }

}  // namespace qk
