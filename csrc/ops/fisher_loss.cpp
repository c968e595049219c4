#include "ops/fisher_loss.h"

#include <optional>

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"

namespace qk {
namespace {

void check_loss(const Tensor& output, const Tensor& target, const std::optional<Tensor>& weight, double scale) {
  const char* op = "fisher_loss";
  check_device(op, output, {{"target", &target}});
  check_float(op, "output", output);
  check_like(op, "target", target, "output", output);
  check(finite_float(scale), op, "scale", "finite in float32", scale);
  if (!weight) return;
  check_device(op, output, {{"weight", &*weight}});
  check_like(op, "weight", *weight, "output", output);
}

}  // namespace

template <void (*kernel)(const FisherLossArgs&)>
std::tuple<Tensor, Tensor> fisher_loss(const Tensor& output, const Tensor& target, const std::optional<Tensor>& weight,
                                       double scale) {
  check_loss(output, target, weight, scale);
  const Tensor outputs = dense(output), targets = dense(target);
  const Tensor weights = weight ? dense(*weight) : outputs;
  Tensor out = torch::stable::new_empty(outputs, {}, ScalarType::Float);
  // float32 too: of float16 it would be 0 or infinite before what it is multiplied with could prevent that.
  Tensor slope = output.scalar_type() == ScalarType::Float
                     ? result_like(outputs)
                     : torch::stable::new_empty(outputs, outputs.sizes(), ScalarType::Float);
  Tensor partial = torch::stable::new_empty(outputs, {sum_chunks(outputs.numel())}, ScalarType::Float);
  QK_DEVICE_GUARD(output);
  kernel({check_float("fisher_loss", "output", output), outputs.const_data_ptr(), targets.const_data_ptr(),
          weight ? weights.const_data_ptr() : nullptr, out.mutable_data_ptr<float>(), slope.mutable_data_ptr<float>(),
          partial.mutable_data_ptr<float>(), outputs.numel(), static_cast<float>(scale)});
  return {out, slope};
}

QK_REGISTER(m) { m.impl("fisher_loss", TORCH_BOX(&fisher_loss<QK_DEVICE::fisher_loss>)); }

}  // namespace qk
