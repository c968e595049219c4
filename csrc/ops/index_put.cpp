#include "ops/index_put.h"

#include "ops/columns_check.h"
#include "ops/values_check.h"

namespace qk {

template <void (*kernel)(const IndexPutArgs&)>
Tensor index_put(const Tensor& x, const Tensor& added, const Tensor& index, const Tensor& source,
                 const std::optional<Tensor>& residual, const std::optional<Tensor>& residual_step,
                 const std::optional<Tensor>& residual_zero, const std::string& activation,
                 const std::optional<Tensor>& out_step, const std::optional<Tensor>& out_zero, int64_t out_bits) {
  check_device("index_put", x, {{"added", &added}, {"index", &index}, {"source", &source}});
  check_tensor(x.scalar_type() == (out_step ? ScalarType::Byte : ScalarType::Float), "index_put", "x",
               out_step ? "uint8 codes, as the result has a step" : "float32, as the result has no step", x);
  check_dtype("index_put", "added", added, ScalarType::Float);
  check_tensor(x.dim() >= 1, "index_put", "x", "[..., N]", x);
  bool fits = added.dim() == x.dim();
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = added.size(i) == x.size(i);
  if (!fits) fail("index_put", "added", "of the shape of x " + describe(x) + " but for the last size", describe(added));
  const int64_t cols = x.size(x.dim() - 1), added_cols = added.size(x.dim() - 1);
  check_tensor(index.dim() == 1, "index_put", "index", "[count]", index);
  check_tensor(source.dim() == 2 && source.size(1) == index.size(0), "index_put", "source", "[terms, count]", source);
  const Tensor at = check_columns("index_put", "index", index, 0, cols);
  const Tensor from = check_columns("index_put", "source", source, -1, added_cols);
  OperandTensors more{};
  if (residual) {
    more = check_operand("index_put", x, "residual", *residual, residual_step, residual_zero);
    check_same_shape("index_put", "residual", *residual, "x", x);
  } else {
    check(!residual_step && !residual_zero, "index_put", "residual", "given where it has a step", "none");
  }
  Result result = check_result("index_put", x, activation, out_step, out_zero, out_bits);
  const Tensor values = dense(x), others = dense(added);
  Tensor out = new_result(x, x.sizes(), result);
  if (x.numel() == 0) return out;
  QK_DEVICE_GUARD(x);
  kernel({values.const_data_ptr(), others.const_data_ptr<float>(), at.const_data_ptr<int32_t>(),
          from.const_data_ptr<int32_t>(), more.operand, result, x.numel() / cols, cols, added_cols, at.numel(),
          from.size(0)});
  return out;
}

QK_REGISTER(m) { m.impl("index_put", TORCH_BOX(&index_put<QK_DEVICE::index_put>)); }

}  // namespace qk
