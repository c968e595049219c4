// Memory for results.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qk {

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
