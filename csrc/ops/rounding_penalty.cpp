#include "ops/rounding_penalty.h"

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

FloatType check_penalty(const char* op, const Tensor& v, double beta) {
  check(beta >= 1 && finite_float(beta), op, "beta", "a number of at least 1, finite in float32", beta);
  return check_float(op, "v", v);
}

}  // namespace

template <void (*kernel)(const RoundingPenaltyArgs&)>
Tensor rounding_penalty(const Tensor& v, double beta) {
  const FloatType type = check_penalty("rounding_penalty", v, beta);
  const Tensor vs = dense(v);
  Tensor out = torch::stable::new_empty(vs, {}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(vs, {sum_chunks(vs.numel())}, ScalarType::Float);
  QK_DEVICE_GUARD(v);
  kernel({type, vs.const_data_ptr(), out.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(), vs.numel(),
          static_cast<float>(beta)});
  return out;
}

template <void (*kernel)(const RoundingPenaltyBackwardArgs&)>
Tensor rounding_penalty_backward(const Tensor& grad, const Tensor& v, double beta) {
  const FloatType type = check_penalty("rounding_penalty_backward", v, beta);
  check_device("rounding_penalty_backward", v, {{"grad", &grad}});
  check_scalar("rounding_penalty_backward", "grad", grad);
  const Tensor grads = dense(grad), vs = dense(v);
  Tensor grad_v = result_like(vs);
  QK_DEVICE_GUARD(v);
  kernel({grads.const_data_ptr<float>(), type, vs.const_data_ptr(), grad_v.mutable_data_ptr(), vs.numel(),
          static_cast<float>(beta)});
  return grad_v;
}

QK_REGISTER(m) {
  m.impl("rounding_penalty", TORCH_BOX(&rounding_penalty<QK_DEVICE::rounding_penalty>));
  m.impl("rounding_penalty_backward", TORCH_BOX(&rounding_penalty_backward<QK_DEVICE::rounding_penalty_backward>));
}

}  // namespace qk
