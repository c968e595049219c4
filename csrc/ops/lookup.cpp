#include "ops/lookup.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {

template <void (*kernel)(const LookupArgs&)>
Tensor lookup(const Tensor& codes, const Tensor& table) {
  check_device("lookup", codes, {{"table", &table}});
  check_dtype("lookup", "codes", codes, ScalarType::Byte);
  const bool floats = table.scalar_type() == ScalarType::Float;
  check_tensor(table.dim() == 1 && table.numel() == 256 && (floats || table.scalar_type() == ScalarType::Byte),
               "lookup", "table", "uint8 or float32 [256]", table, "Give a value for every code, used or not.");
  const Tensor us = dense(codes), values = dense(table);
  Tensor out = torch::stable::new_empty(us, us.sizes(), table.scalar_type());
  QK_DEVICE_GUARD(codes);
  kernel({us.const_data_ptr<uint8_t>(), values.const_data_ptr(), out.mutable_data_ptr(), us.numel(), floats});
  return out;
}

QK_REGISTER(m) { m.impl("lookup", TORCH_BOX(&lookup<QK_DEVICE::lookup>)); }

}  // namespace qk
