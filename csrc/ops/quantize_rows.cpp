#include "ops/quantize_rows.h"

#include <tuple>

#include "core/check.h"
#include "core/register.h"

namespace qk {

template <void (*kernel)(const QuantizeRowsArgs&)>
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t bits) {
  check_dtype("quantize_rows", "x", x, ScalarType::Float);
  check_tensor(x.dim() >= 1, "quantize_rows", "x", "[..., cols]", x, "A single value has no row.");
  check_bits("quantize_rows", bits);
  const Tensor xs = dense(x);
  const auto shape = xs.sizes();
  const auto row_shape = shape.slice(0, shape.size() - 1);
  int64_t rows = 1;
  for (const int64_t n : row_shape) rows *= n;
  Tensor codes = torch::stable::new_empty(xs, shape, ScalarType::Byte);
  Tensor step = torch::stable::new_empty(xs, row_shape);
  Tensor zero = torch::stable::new_empty(xs, row_shape, ScalarType::Int);
  QK_DEVICE_GUARD(x);
  kernel({xs.const_data_ptr<float>(), codes.mutable_data_ptr<uint8_t>(), step.mutable_data_ptr<float>(),
          zero.mutable_data_ptr<int32_t>(), rows, shape[shape.size() - 1], static_cast<int>(bits)});
  return {codes, step, zero};
}

QK_REGISTER(m) { m.impl("quantize_rows", TORCH_BOX(&quantize_rows<QK_DEVICE::quantize_rows>)); }

}  // namespace qk
