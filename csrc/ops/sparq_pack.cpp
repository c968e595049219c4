#include "ops/sparq_pack.h"

#include "core/check.h"
#include "core/register.h"
#include "ops/sparq_check.h"

namespace qk {

template <void (*kernel)(const SparqPackArgs&)>
Tensor sparq_pack(const Tensor& codes, int64_t bits, int64_t stride, bool pairs) {
  check_dtype("sparq_pack", "codes", codes, ScalarType::Byte);
  check_tensor(codes.dim() == 2, "sparq_pack", "codes", "[rows, cols]", codes, "Reshape NHWC codes to [-1, C].");
  check_sparq_family("sparq_pack", bits, stride);
  const Tensor us = dense(codes);
  const int64_t rows = us.size(0), cols = us.size(1);
  const int n = static_cast<int>(bits), step = static_cast<int>(stride);
  const int64_t row_bytes = sparq_row_bytes(cols, n, step, pairs);
  Tensor packed = torch::stable::new_empty(us, {rows, row_bytes});
  QK_DEVICE_GUARD(codes);
  SparqPackArgs args{
      us.const_data_ptr<uint8_t>(), packed.mutable_data_ptr<uint8_t>(), nullptr, rows, cols, row_bytes, n, step, pairs};
  if (!codes.is_cpu()) {
    kernel(args);
    return packed;
  }
  Tensor lost = torch::stable::new_empty(us, {rows});
  args.lost = lost.mutable_data_ptr<uint8_t>();
  kernel(args);
  for (int64_t row = 0; row < rows; ++row)
    check(args.lost[row] == 0, "sparq_pack", "codes", "values of the windows",
          "another one in row " + std::to_string(row),
          "Cut them with qk.ops.sparq first, with the same family and pairs.");
  return packed;
}

QK_REGISTER(m) { m.impl("sparq_pack", TORCH_BOX(&sparq_pack<QK_DEVICE::sparq_pack>)); }

}  // namespace qk
