#include "ops/soft_round.h"

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

Rows check_soft_round(const char* op, const Tensor& weight, const Tensor& v, const Tensor& step, const Tensor& zero,
                      int64_t bits) {
  check_device(op, weight, {{"v", &v}, {"step", &step}, {"zero", &zero}});
  check_dtype(op, "weight", weight, ScalarType::Float);
  check_dtype(op, "v", v, ScalarType::Float);
  check_same_shape(op, "v", v, "weight", weight);
  check_bits(op, bits);
  return check_rows(op, weight, step, zero, bits, "weight");
}

}  // namespace

template <void (*kernel)(const SoftRoundArgs&)>
Tensor soft_round(const Tensor& weight, const Tensor& v, const Tensor& step, const Tensor& zero, int64_t bits) {
  const auto [rows, cols, steps, zeros] = check_soft_round("soft_round", weight, v, step, zero, bits);
  const Tensor weights = dense(weight), vs = dense(v);
  Tensor out = result_like(weights);
  QK_DEVICE_GUARD(weight);
  kernel({weights.const_data_ptr<float>(), vs.const_data_ptr<float>(), steps.const_data_ptr<float>(),
          zeros.const_data_ptr<int32_t>(), out.mutable_data_ptr<float>(), rows, cols, static_cast<int>(bits)});
  return out;
}

template <void (*kernel)(const SoftRoundBackwardArgs&)>
Tensor soft_round_backward(const Tensor& grad, const Tensor& weight, const Tensor& v, const Tensor& step,
                           const Tensor& zero, int64_t bits, double penalty, double beta) {
  const auto [rows, cols, steps, zeros] = check_soft_round("soft_round_backward", weight, v, step, zero, bits);
  check(finite_float(penalty), "soft_round_backward", "penalty", "a number, finite in float32", penalty);
  check(beta >= 1 && finite_float(beta), "soft_round_backward", "beta", "a number of at least 1, finite in float32",
        beta);
  check_device("soft_round_backward", weight, {{"grad", &grad}});
  check_dtype("soft_round_backward", "grad", grad, ScalarType::Float);
  check_same_shape("soft_round_backward", "grad", grad, "weight", weight);
  const Tensor grads = dense(grad), weights = dense(weight), vs = dense(v);
  Tensor grad_v = result_like(weights);
  QK_DEVICE_GUARD(weight);
  kernel({grads.const_data_ptr<float>(), weights.const_data_ptr<float>(), vs.const_data_ptr<float>(),
          steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(), grad_v.mutable_data_ptr<float>(), rows, cols,
          static_cast<int>(bits), static_cast<float>(penalty), static_cast<float>(beta)});
  return grad_v;
}

QK_REGISTER(m) {
  m.impl("soft_round", TORCH_BOX(&soft_round<QK_DEVICE::soft_round>));
  m.impl("soft_round_backward", TORCH_BOX(&soft_round_backward<QK_DEVICE::soft_round_backward>));
}

}  // namespace qk
