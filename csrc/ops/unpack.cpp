#include "ops/unpack.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {

template <void (*kernel)(const UnpackArgs&)>
Tensor unpack(const Tensor& packed, int64_t bits, int64_t cols) {
  check_dtype("unpack", "packed", packed, ScalarType::Byte);
  check_tensor(packed.dim() == 2, "unpack", "packed", "[rows, row_bytes]", packed);
  check_storage_bits("unpack", bits);
  const int64_t rows = packed.size(0), row_bytes = packed.size(1);
  if (cols < 0 || packed_row_bytes(cols, bits) != row_bytes)
    fail("unpack", "cols", "the length of rows that pack into " + std::to_string(row_bytes) + " bytes",
         std::to_string(cols));
  const Tensor bytes = dense(packed);
  Tensor codes = torch::stable::new_empty(bytes, {rows, cols});
  QK_DEVICE_GUARD(packed);
  kernel({bytes.const_data_ptr<uint8_t>(), codes.mutable_data_ptr<uint8_t>(), rows, cols, row_bytes,
          static_cast<int>(bits)});
  return codes;
}

QK_REGISTER(m) { m.impl("unpack", TORCH_BOX(&unpack<QK_DEVICE::unpack>)); }

}  // namespace qk
