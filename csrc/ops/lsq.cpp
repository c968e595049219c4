#include "ops/lsq.h"

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

Rows check_lsq(const char* op, const Tensor& x, const Tensor& step, const Tensor& zero, int64_t bits,
               const std::string& boundary) {
  check_device(op, x, {{"step", &step}, {"zero", &zero}});
  check_float(op, "x", x);
  check_bits(op, bits);
  check(boundary == "paper" || boundary == "torch", op, "boundary", "paper or torch", boundary);
  return check_rows(op, x, step, zero, bits);
}

}  // namespace

template <void (*kernel)(const LsqArgs&)>
Tensor lsq(const Tensor& x, const Tensor& step, const Tensor& zero, int64_t bits, double, const std::string& boundary) {
  const auto [rows, cols, steps, zeros] = check_lsq("lsq", x, step, zero, bits, boundary);
  const Tensor xs = dense(x);
  Tensor out = result_like(xs);
  QK_DEVICE_GUARD(x);
  kernel({check_float("lsq", "x", x), xs.const_data_ptr(), steps.const_data_ptr<float>(),
          zeros.const_data_ptr<int32_t>(), out.mutable_data_ptr(), rows, cols, static_cast<int>(bits)});
  return out;
}

template <void (*kernel)(const LsqBackwardArgs&)>
std::tuple<Tensor, Tensor> lsq_backward(const Tensor& grad, const Tensor& x, const Tensor& step, const Tensor& zero,
                                        int64_t bits, double grad_scale, const std::string& boundary) {
  const auto [rows, cols, steps, zeros] = check_lsq("lsq_backward", x, step, zero, bits, boundary);
  check_device("lsq_backward", x, {{"grad", &grad}});
  check_like("lsq_backward", "grad", grad, "x", x);
  const Tensor grads = dense(grad), xs = dense(x);
  Tensor grad_x = result_like(xs);
  Tensor grad_step = result_like(steps);
  Tensor partial = torch::stable::new_empty(steps, {rows * sum_chunks(cols)});
  QK_DEVICE_GUARD(x);
  kernel({check_float("lsq_backward", "x", x), grads.const_data_ptr(), xs.const_data_ptr(),
          steps.const_data_ptr<float>(), zeros.const_data_ptr<int32_t>(), grad_x.mutable_data_ptr(),
          grad_step.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(), rows, cols, static_cast<int>(bits),
          static_cast<float>(grad_scale), boundary == "torch"});
  return {grad_x, grad_step};
}

QK_REGISTER(m) {
  m.impl("lsq", TORCH_BOX(&lsq<QK_DEVICE::lsq>));
  m.impl("lsq_backward", TORCH_BOX(&lsq_backward<QK_DEVICE::lsq_backward>));
}

}  // namespace qk
