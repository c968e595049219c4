#include "ops/sparq.h"

#include "core/check.h"
#include "core/register.h"
#include "ops/sparq_check.h"

namespace qk {

template <void (*kernel)(const SparqArgs&)>
Tensor sparq(const Tensor& codes, int64_t bits, int64_t stride, bool round, bool pairs,
             const std::optional<Tensor>& zero) {
  check_dtype("sparq", "codes", codes, ScalarType::Byte);
  check_tensor(codes.dim() >= 1, "sparq", "codes", "[..., cols]", codes, "A single value has no partner.");
  check_sparq_family("sparq", bits, stride);
  if (zero) {
    check_device("sparq", codes, {{"zero", &*zero}});
    check_dtype("sparq", "zero", *zero, ScalarType::Int);
    check_tensor(zero->numel() == 1, "sparq", "zero", "one value", *zero);
    check_zero_values("sparq", "zero", *zero, 8);
  }
  const Tensor us = dense(codes);
  Tensor out = torch::stable::new_empty(us, us.sizes());
  if (us.numel() == 0) return out;
  const int64_t cols = pairs ? us.size(us.dim() - 1) : us.numel();
  QK_DEVICE_GUARD(codes);
  kernel({us.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>(), us.numel() / cols, cols,
          static_cast<int>(bits), static_cast<int>(stride), round, pairs,
          zero ? zero->const_data_ptr<int32_t>() : nullptr});
  return out;
}

QK_REGISTER(m) { m.impl("sparq", TORCH_BOX(&sparq<QK_DEVICE::sparq>)); }

}  // namespace qk
