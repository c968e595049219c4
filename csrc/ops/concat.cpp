#include "ops/concat.h"

#include <vector>

#include "ops/values_check.h"

namespace qk {

template <void (*kernel)(const ConcatArgs&)>
Tensor concat(const std::vector<Tensor>& codes, const std::vector<Tensor>& steps, const std::vector<Tensor>& zeros,
              const Tensor& out_step, const Tensor& out_zero, int64_t out_bits) {
  check(!codes.empty(), "concat", "codes", "one tensor or more", "none");
  check(steps.size() == codes.size(), "concat", "steps", "one for each tensor of codes", steps.size());
  check(zeros.size() == codes.size(), "concat", "zeros", "one for each tensor of codes", zeros.size());
  check(is_fake_quant_width(out_bits), "concat", "out_bits", "a width from 2 to 8", out_bits);
  const Tensor& first = codes[0];
  check_tensor(first.dim() >= 1, "concat", "codes[0]", "[..., C]", first);
  check_one_step("concat", first, "out", out_step, out_zero, out_bits);
  const int64_t last = first.dim() - 1;
  std::vector<Tensor> held;
  std::vector<ConcatPart> parts;
  int64_t channels = 0, pixels = 1;
  for (int64_t i = 0; i < last; ++i) pixels *= first.size(i);
  for (size_t i = 0; i < codes.size(); ++i) {
    const Tensor& part = codes[i];
    const std::string name = "codes[" + std::to_string(i) + "]";
    check_device("concat", first, {{name.c_str(), &part}});
    check_dtype("concat", name.c_str(), part, ScalarType::Byte);
    bool fits = part.dim() == first.dim();
    for (int64_t j = 0; fits && j < last; ++j) fits = part.size(j) == first.size(j);
    if (!fits)
      fail("concat", name.c_str(), "of the shape of codes[0] but for its last axis, " + describe(first),
           describe(part));
    check_one_step("concat", first, name, steps[i], zeros[i], 8);
    held.push_back(dense(part));
    parts.push_back({held.back().const_data_ptr<uint8_t>(), part.size(last), steps[i].const_data_ptr<float>(),
                     zeros[i].const_data_ptr<int32_t>()});
    channels += part.size(last);
  }
  std::vector<int64_t> sizes(first.sizes().begin(), first.sizes().end());
  sizes.back() = channels;
  Tensor out = torch::stable::new_empty(first, sizes, ScalarType::Byte);
  QK_DEVICE_GUARD(first);
  kernel({parts.data(), static_cast<int64_t>(parts.size()), out.mutable_data_ptr<uint8_t>(), pixels, channels,
          out_step.const_data_ptr<float>(), out_zero.const_data_ptr<int32_t>(), static_cast<int>(out_bits)});
  return out;
}

QK_REGISTER(m) { m.impl("concat", TORCH_BOX(&concat<QK_DEVICE::concat>)); }

}  // namespace qk
