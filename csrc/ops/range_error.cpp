#include "ops/range_error.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {

template <void (*kernel)(const RangeErrorArgs&)>
Tensor range_error(const Tensor& x, const Tensor& step, const Tensor& zero, int64_t bits, double power) {
  constexpr auto op = "range_error";
  check_device(op, x, {{"step", &step}, {"zero", &zero}});
  const FloatType type = check_float(op, "x", x);
  check_dtype(op, "step", step, ScalarType::Float);
  check_dtype(op, "zero", zero, ScalarType::Int);
  check_tensor(x.dim() == 2, op, "x", "[rows, cols]", x, "Reshape a tensor with one range to [1, -1].");
  check_tensor(step.dim() == 2 && step.size(0) == x.size(0), op, "step", "[rows of x, candidates]", step);
  check_same_shape(op, "zero", zero, "step", step);
  check_bits(op, bits);
  check(static_cast<float>(power) > 0 && finite_float(power), op, "power", "positive and finite in float32", power);
  const Tensor xs = dense(x), steps = dense(step), zeros = dense(zero);
  check_step_values(op, "step", steps);
  check_zero_values(op, "zero", zeros, bits);
  const int64_t rows = x.size(0), cols = x.size(1), candidates = step.size(1);
  Tensor out = torch::stable::new_empty(steps, {rows, candidates});
  Tensor partial = torch::stable::new_empty(xs, {rows, range_error_chunks(cols), candidates}, ScalarType::Double);
  QK_DEVICE_GUARD(x);
  kernel({type, xs.const_data_ptr(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
          out.mutable_data_ptr<float>(), partial.mutable_data_ptr<double>(), rows, cols, candidates,
          static_cast<int>(bits), static_cast<float>(power)});
  return out;
}

QK_REGISTER(m) { m.impl("range_error", TORCH_BOX(&range_error<QK_DEVICE::range_error>)); }

}  // namespace qk
