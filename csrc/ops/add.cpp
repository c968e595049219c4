#include "ops/add.h"

#include "ops/values_check.h"

namespace qk {

template <void (*kernel)(const AddArgs&)>
Tensor add(const Tensor& a, const std::optional<Tensor>& a_step, const std::optional<Tensor>& a_zero, const Tensor& b,
           const std::optional<Tensor>& b_step, const std::optional<Tensor>& b_zero, const std::string& activation,
           const std::optional<Tensor>& out_step, const std::optional<Tensor>& out_zero, int64_t out_bits) {
  const OperandTensors as = check_operand("add", a, "a", a, a_step, a_zero);
  const OperandTensors bs = check_operand("add", a, "b", b, b_step, b_zero);
  check_same_shape("add", "b", b, "a", a);
  Result result = check_result("add", a, activation, out_step, out_zero, out_bits);
  Tensor out = new_result(a, a.sizes(), result);
  QK_DEVICE_GUARD(a);
  kernel({as.operand, bs.operand, result, a.numel()});
  return out;
}

QK_REGISTER(m) { m.impl("add", TORCH_BOX(&add<QK_DEVICE::add>)); }

}  // namespace qk
