#include "ops/soft_round.h"

#include <optional>

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

Rows check_soft_round(const char* op, const Tensor& weight, const Tensor& v, const Tensor& step, const Tensor& zero,
                      int64_t bits) {
  check_device(op, weight, {{"v", &v}, {"step", &step}, {"zero", &zero}});
  check_float(op, "weight", weight);
  check_like(op, "v", v, "weight", weight);
  check_bits(op, bits);
  return check_rows(op, weight, step, zero, bits, "weight");
}

// As with steps, the values are checked where reading them does not wait for a device.
std::optional<Tensor> check_penalty(const Tensor& weight, const std::optional<Tensor>& penalty) {
  constexpr const char* op = "soft_round_backward";
  if (!penalty) return std::nullopt;
  check_device(op, weight, {{"penalty", &*penalty}});
  check_dtype(op, "penalty", *penalty, ScalarType::Float);
  check_tensor(penalty->dim() == 1 && penalty->numel() == 2, op, "penalty", "[2], a weight and an exponent", *penalty);
  const Tensor values = dense(*penalty);
  if (values.is_cpu()) {
    const float* p = values.const_data_ptr<float>();
    check(std::isfinite(p[0]), op, "penalty[0]", "finite", p[0]);
    check(p[1] >= 1 && std::isfinite(p[1]), op, "penalty[1]", "finite and at least 1", p[1]);
  }
  return values;
}

}  // namespace

template <void (*kernel)(const SoftRoundArgs&)>
Tensor soft_round(const Tensor& weight, const Tensor& v, const Tensor& step, const Tensor& zero, int64_t bits) {
  const auto [rows, cols, steps, zeros] = check_soft_round("soft_round", weight, v, step, zero, bits);
  const Tensor weights = dense(weight), vs = dense(v);
  Tensor out = result_like(weights);
  QK_DEVICE_GUARD(weight);
  kernel({check_float("soft_round", "weight", weight), weights.const_data_ptr(), vs.const_data_ptr(),
          steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(), out.mutable_data_ptr(), rows, cols,
          static_cast<int>(bits)});
  return out;
}

template <void (*kernel)(const SoftRoundBackwardArgs&)>
Tensor soft_round_backward(const Tensor& grad, const Tensor& weight, const Tensor& v, const Tensor& step,
                           const Tensor& zero, int64_t bits, const std::optional<Tensor>& penalty) {
  const auto [rows, cols, steps, zeros] = check_soft_round("soft_round_backward", weight, v, step, zero, bits);
  check_device("soft_round_backward", weight, {{"grad", &grad}});
  check_like("soft_round_backward", "grad", grad, "weight", weight);
  const std::optional<Tensor> added = check_penalty(weight, penalty);
  const Tensor grads = dense(grad), weights = dense(weight), vs = dense(v);
  Tensor grad_v = result_like(weights);
  QK_DEVICE_GUARD(weight);
  kernel({check_float("soft_round_backward", "weight", weight), grads.const_data_ptr(), weights.const_data_ptr(),
          vs.const_data_ptr(), steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(),
          grad_v.mutable_data_ptr(), rows, cols, static_cast<int>(bits),
          added ? added->const_data_ptr<float>() : nullptr});
  return grad_v;
}

QK_REGISTER(m) {
  m.impl("soft_round", TORCH_BOX(&soft_round<QK_DEVICE::soft_round>));
  m.impl("soft_round_backward", TORCH_BOX(&soft_round_backward<QK_DEVICE::soft_round_backward>));
}

}  // namespace qk
