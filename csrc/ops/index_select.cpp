#include "ops/index_select.h"

#include <vector>

#include "core/register.h"
#include "ops/columns_check.h"

namespace qk {

template <void (*kernel)(const IndexSelectArgs&)>
Tensor index_select(const Tensor& codes, const Tensor& index) {
  check_device("index_select", codes, {{"index", &index}});
  check_dtype("index_select", "codes", codes, ScalarType::Byte);
  check_tensor(codes.dim() >= 1, "index_select", "codes", "[..., C]", codes);
  check_tensor(index.dim() == 1, "index_select", "index", "[count]", index);
  const int64_t last = codes.dim() - 1, cols = codes.size(last);
  const Tensor at = check_columns("index_select", "index", index, 0, cols);
  const Tensor us = dense(codes);
  std::vector<int64_t> sizes(us.sizes().begin(), us.sizes().end());
  sizes[last] = at.numel();
  Tensor out = torch::stable::new_empty(us, sizes, ScalarType::Byte);
  if (out.numel() == 0) return out;
  QK_DEVICE_GUARD(codes);
  kernel({us.const_data_ptr<uint8_t>(), at.const_data_ptr<int32_t>(), out.mutable_data_ptr<uint8_t>(),
          out.numel() / at.numel(), cols, at.numel()});
  return out;
}

QK_REGISTER(m) { m.impl("index_select", TORCH_BOX(&index_select<QK_DEVICE::index_select>)); }

}  // namespace qk
