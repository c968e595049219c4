#include "ops/pack.h"

#include "core/check.h"
#include "core/register.h"

namespace qk {
namespace {

[[noreturn]] void refuse(const Tensor& codes, const uint8_t* values, int64_t row, int64_t bits) {
  const int64_t cols = codes.size(1);
  for (int64_t col = 0; col < cols; ++col)
    if (const int code = values[row * cols + col]; code > top_code(bits))
      fail("pack", "codes", "at most " + std::to_string(top_code(bits)) + " to fit " + std::to_string(bits) + " bits",
           std::to_string(code) + " at [" + std::to_string(row) + ", " + std::to_string(col) + "]");
  throw std::runtime_error("qk::pack: codes changed while they were packed.");
}

}  // namespace

template <void (*kernel)(const PackArgs&)>
Tensor pack(const Tensor& codes, int64_t bits) {
  check_dtype("pack", "codes", codes, ScalarType::Byte);
  check_tensor(codes.dim() == 2, "pack", "codes", "[rows, cols]", codes, "Reshape a weight to [N, -1].");
  check_storage_bits("pack", bits);
  const Tensor us = dense(codes);
  const int64_t rows = us.size(0), cols = us.size(1), row_bytes = packed_row_bytes(cols, bits);
  Tensor packed = torch::stable::new_empty(us, {rows, row_bytes});
  QK_DEVICE_GUARD(codes);
  PackArgs args{us.const_data_ptr<uint8_t>(), packed.mutable_data_ptr<uint8_t>(), nullptr, rows, cols, row_bytes,
                static_cast<int>(bits)};
  if (!codes.is_cpu()) {
    kernel(args);
    return packed;
  }
  Tensor used = torch::stable::new_empty(us, {rows});
  args.used = used.mutable_data_ptr<uint8_t>();
  kernel(args);
  for (int64_t row = 0; row < rows; ++row)
    if (args.used[row] > top_code(bits)) refuse(us, args.codes, row, bits);
  return packed;
}

QK_REGISTER(m) { m.impl("pack", TORCH_BOX(&pack<QK_DEVICE::pack>)); }

}  // namespace qk
