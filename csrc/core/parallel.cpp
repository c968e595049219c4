#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace qk {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n, context);  // a call into the pool costs more than a small job
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace qk
