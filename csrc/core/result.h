// Memory for results.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qk {

// Codes or float32 on the device of t, not filled. new_empty goes through the dispatcher, which takes longer than small
// kernels do.
template <class Sizes>
torch::stable::Tensor new_values(const torch::stable::Tensor& t, const Sizes& sizes, bool codes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  const int32_t dtype = codes ? aoti_torch_dtype_uint8() : aoti_torch_dtype_float32();
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, t.get_device_index(),
                                                         &made));
  return torch::stable::Tensor(made);
}

// A tensor like t, not filled. malloc takes large ones fresh from the system at every call, and then their page faults
// cost more than the kernel; huge pages make them 512 times fewer.
inline torch::stable::Tensor result_like(const torch::stable::Tensor& t) {
  torch::stable::Tensor out = torch::stable::new_empty(t, t.sizes());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t large = 4 << 20, page = 4096;
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (out.is_cpu() && bytes >= large) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return out;
}

}  // namespace qk
