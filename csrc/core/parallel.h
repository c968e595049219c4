// Threads for kernels without a torch header: the pool is torch's, behind one plain function.
#pragma once
#include <cstdint>

namespace qk {

int thread_count();
void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// f(begin, end) over [0, n), at least `grain` items a call. Static, so that each instruction set keeps its own copy.
template <class F>
static inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_run(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace qk
