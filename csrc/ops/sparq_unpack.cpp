#include "ops/sparq_unpack.h"

#include "core/check.h"
#include "core/register.h"
#include "ops/sparq_check.h"

namespace qk {

template <void (*kernel)(const SparqUnpackArgs&)>
Tensor sparq_unpack(const Tensor& packed, int64_t cols, int64_t bits, int64_t stride, bool pairs) {
  check_dtype("sparq_unpack", "packed", packed, ScalarType::Byte);
  check_tensor(packed.dim() == 2, "sparq_unpack", "packed", "[rows, row_bytes]", packed);
  check_sparq_family("sparq_unpack", bits, stride);
  const int n = static_cast<int>(bits), step = static_cast<int>(stride);
  const int64_t rows = packed.size(0), row_bytes = packed.size(1);
  if (cols < 0 || sparq_row_bytes(cols, n, step, pairs) != row_bytes)
    fail("sparq_unpack", "cols", "the length of rows that pack into " + std::to_string(row_bytes) + " bytes",
         std::to_string(cols));
  const Tensor bytes = dense(packed);
  Tensor codes = torch::stable::new_empty(bytes, {rows, cols});
  QK_DEVICE_GUARD(packed);
  kernel({bytes.const_data_ptr<uint8_t>(), codes.mutable_data_ptr<uint8_t>(), rows, cols, row_bytes, n, step, pairs});
  return codes;
}

QK_REGISTER(m) { m.impl("sparq_unpack", TORCH_BOX(&sparq_unpack<QK_DEVICE::sparq_unpack>)); }

}  // namespace qk
