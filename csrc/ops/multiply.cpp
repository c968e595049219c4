#include "ops/multiply.h"

#include "ops/values_check.h"

namespace qk {

template <void (*kernel)(const MultiplyArgs&)>
Tensor multiply(const Tensor& x, const std::optional<Tensor>& x_step, const std::optional<Tensor>& x_zero,
                const Tensor& gate, const std::optional<Tensor>& gate_step, const std::optional<Tensor>& gate_zero,
                const std::string& activation, const std::optional<Tensor>& out_step,
                const std::optional<Tensor>& out_zero, int64_t out_bits) {
  const OperandTensors xs = check_operand("multiply", x, "x", x, x_step, x_zero);
  const OperandTensors gates = check_operand("multiply", x, "gate", gate, gate_step, gate_zero);
  check_tensor(x.dim() >= 2, "multiply", "x", "[B, ..., C]", x);
  const int64_t images = x.size(0), channels = x.size(x.dim() - 1);
  bool fits = gate.dim() == x.dim() && gate.size(0) == images && gate.size(x.dim() - 1) == channels;
  for (int64_t i = 1; fits && i + 1 < x.dim(); ++i) fits = gate.size(i) == 1;
  if (!fits)
    fail("multiply", "gate", "[B, 1, ..., C]: one value for each channel of each image of x " + describe(x),
         describe(gate));
  Result result = check_result("multiply", x, activation, out_step, out_zero, out_bits);
  Tensor out = new_result(x, x.sizes(), result);
  if (x.numel() == 0) return out;
  QK_DEVICE_GUARD(x);
  kernel({xs.operand, gates.operand, result, images, x.numel() / (images * channels), channels});
  return out;
}

QK_REGISTER(m) { m.impl("multiply", TORCH_BOX(&multiply<QK_DEVICE::multiply>)); }

}  // namespace qk
