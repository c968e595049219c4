#include "ops/rounding_penalty.h"

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

void check_penalty(const char* op, const Tensor& v, double beta) {
  check_dtype(op, "v", v, ScalarType::Float);
  check(beta >= 1 && finite_float(beta), op, "beta", "a number of at least 1, finite in float32", beta);
}

}  // namespace

template <void (*kernel)(const RoundingPenaltyArgs&)>
Tensor rounding_penalty(const Tensor& v, double beta) {
  check_penalty("rounding_penalty", v, beta);
  const Tensor vs = dense(v);
  Tensor out = torch::stable::new_empty(vs, {});
  Tensor partial = torch::stable::new_empty(vs, {sum_chunks(vs.numel())});
  QK_DEVICE_GUARD(v);
  kernel({vs.const_data_ptr<float>(), out.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(), vs.numel(),
          static_cast<float>(beta)});
  return out;
}

template <void (*kernel)(const RoundingPenaltyBackwardArgs&)>
Tensor rounding_penalty_backward(const Tensor& grad, const Tensor& v, double beta) {
  check_penalty("rounding_penalty_backward", v, beta);
  check_device("rounding_penalty_backward", v, {{"grad", &grad}});
  check_scalar("rounding_penalty_backward", "grad", grad);
  const Tensor grads = dense(grad), vs = dense(v);
  Tensor grad_v = result_like(vs);
  QK_DEVICE_GUARD(v);
  kernel({grads.const_data_ptr<float>(), vs.const_data_ptr<float>(), grad_v.mutable_data_ptr<float>(), vs.numel(),
          static_cast<float>(beta)});
  return grad_v;
}

QK_REGISTER(m) {
  m.impl("rounding_penalty", TORCH_BOX(&rounding_penalty<QK_DEVICE::rounding_penalty>));
  m.impl("rounding_penalty_backward", TORCH_BOX(&rounding_penalty_backward<QK_DEVICE::rounding_penalty_backward>));
}

}  // namespace qk
