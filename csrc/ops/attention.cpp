#include "ops/attention.h"

#include "ops/attention_check.h"
#include "ops/values_check.h"

namespace qk {

template <void (*kernel)(const AttentionArgs&)>
Tensor attention(const Tensor& q, const Tensor& q_step, const Tensor& q_zero, const Tensor& k, const Tensor& k_step,
                 const Tensor& k_zero, const Tensor& v, const Tensor& v_step, const Tensor& v_zero, int64_t heads,
                 const std::optional<Tensor>& mask, std::optional<double> scale, const std::optional<Tensor>& out_step,
                 const std::optional<Tensor>& out_zero, int64_t out_bits) {
  constexpr const char* op = "attention";
  const OperandTensors qs = check_operand(op, q, "q", q, q_step, q_zero);
  const OperandTensors ks = check_operand(op, q, "k", k, k_step, k_zero);
  const OperandTensors vs = check_operand(op, q, "v", v, v_step, v_zero);
  const auto sizes_of = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  std::vector<int64_t> mask_sizes;
  Tensor seen = q;
  if (mask) {
    check_device(op, q, {{"mask", &*mask}});
    const auto dtype = mask->scalar_type();
    check_tensor(dtype == ScalarType::Bool || dtype == ScalarType::Byte, op, "mask", "bool or uint8", *mask);
    seen = dense(*mask);
    mask_sizes = sizes_of(*mask);
  }
  AttentionArgs a =
      attention_args(op, sizes_of(q), sizes_of(k), sizes_of(v), mask ? &mask_sizes : nullptr, heads, scale);
  a.q = qs.operand, a.k = ks.operand, a.v = vs.operand;
  a.mask = mask ? static_cast<const uint8_t*>(seen.const_data_ptr()) : nullptr;
  a.out = check_result(op, q, "none", out_step, out_zero, out_bits);
  Tensor out = new_result(q, std::vector<int64_t>{a.batch, a.queries, a.heads * a.width}, a.out);
  if (out.numel() == 0) return out;
  QK_DEVICE_GUARD(q);
  kernel(a);
  return out;
}

QK_REGISTER(m) { m.impl("attention", TORCH_BOX(&attention<QK_DEVICE::attention>)); }

}  // namespace qk
