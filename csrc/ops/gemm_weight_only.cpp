#include "ops/gemm_weight_only.h"

#include <vector>

#include "ops/integer.h"

namespace qk {
template <void (*kernel)(const GemmWeightOnlyArgs&)>
Tensor gemm_weight_only(const Tensor& x, const Tensor& weight, const Tensor& weight_step,
                        const std::optional<Tensor>& bias, int64_t bits) {
  constexpr const char* op = "gemm_weight_only";
  check_device(op, x, {{"weight", &weight}, {"weight_step", &weight_step}});
  const FloatType type = check_float(op, "x", x);
  check_storage_bits(op, bits);
  check_tensor(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, op, "x", "[..., K] with K of 1 or more", x);
  const int64_t k = x.size(x.dim() - 1), m = x.numel() / k;
  check_size(op, "K", k, 1);
  check_size(op, "rows of x", m, 0);
  const int64_t k_groups = check_weight_step(op, weight_step, k), n = weight_step.size(0);
  product(op, "the result", {m, n});
  const WeightShape shape{n, 1, 1, k, 1, k_groups, static_cast<int>(bits)};
  const Tensor xs = dense(x), weights = dense(weight), steps = dense(weight_step);
  const PackedLayout layout = check_prepacked(op, weights, shape);
  const std::optional<Tensor> biases = check_bias(op, x, bias, n);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(n);
  Tensor out = torch::stable::new_empty(xs, sizes);
  QK_DEVICE_GUARD(x);
  kernel({xs.const_data_ptr(), weights.const_data_ptr<uint8_t>(), out.mutable_data_ptr(), type, m, shape, layout,
          steps.const_data_ptr<float>(), biases ? biases->const_data_ptr<float>() : nullptr});
  return out;
}

QK_REGISTER(m) { m.impl("gemm_weight_only", TORCH_BOX(&gemm_weight_only<QK_DEVICE::gemm_weight_only>)); }

}  // namespace qk
