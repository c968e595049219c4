#include "ops/gemm.h"

#include <vector>

#include "ops/integer.h"

namespace qk {

template <void (*kernel)(const GemmArgs&)>
Tensor gemm(const Tensor& x, const Tensor& x_step, const Tensor& x_zero, const Tensor& weight,
            const Tensor& weight_step, const std::optional<Tensor>& bias, int64_t bits, int64_t x_bits,
            const std::string& activation, const std::optional<Tensor>& out_step, const std::optional<Tensor>& out_zero,
            int64_t out_bits, const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_step,
            const std::optional<Tensor>& residual_zero) {
  check_device("gemm", x, {{"weight", &weight}});
  check_dtype("gemm", "x", x, ScalarType::Byte);
  check_storage_bits("gemm", bits);
  check_tensor(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "gemm", "x", "codes [..., K] with K of 1 or more", x);
  const int64_t k = x.size(x.dim() - 1), m = x.numel() / k;
  check_size("gemm", "K", k, 1);
  check_size("gemm", "rows of x", m, 0);
  const int64_t k_groups = check_weight_step("gemm", weight_step, k), n = weight_step.size(0);
  const WeightShape shape{n, 1, 1, k, 1, k_groups, static_cast<int>(bits)};
  EpilogueTensors t =
      check_epilogue("gemm", x, x_step, x_zero, m, x_bits, weight_step, bias, activation, out_step, out_zero, out_bits);
  product("gemm", "the result", {m, n});
  const Tensor xs = dense(x), weights = dense(weight);
  const PackedLayout layout = check_prepacked("gemm", weights, shape);
  check_sum("gemm", xs, x_bits, shape);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(n);
  check_residual("gemm", x, sizes, residual, residual_step, residual_zero, t);
  Tensor out = new_values(xs, sizes, t.epilogue.out_step);
  QK_DEVICE_GUARD(x);
  kernel({xs.const_data_ptr<uint8_t>(), weights.const_data_ptr<uint8_t>(), result_data(out, t.epilogue), m, shape,
          layout, t.epilogue});
  return out;
}

QK_REGISTER(m) { m.impl("gemm", TORCH_BOX(&gemm<QK_DEVICE::gemm>)); }

}  // namespace qk
