#include "ops/fisher_loss.h"

#include "cuda/floats.cuh"
#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team, class T, bool weighted>
__global__ void fisher_loss_kernel(FisherLossArgs a) {
  const float twice = 2.0f * a.scale;
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t job) {
    const T *output = static_cast<const T*>(a.output) + at, *target = static_cast<const T*>(a.target) + at;
    const T* weight = weighted ? static_cast<const T*>(a.weight) + at : output;
    float* slope = a.slope + at;
    float sum = 0;
    const int before = values_before<together<T>>(output, target, weight, slope);
    each_value<team, together<T>>(count, before, [&](int64_t i, auto width) {
      const auto targets = load_floats<width>(target + i), weights = load_floats<width>(weight + i);
      auto outputs = load_floats<width>(output + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float apart = outputs.v[j] - targets.v[j];
        const float weighed = weighted ? weights.v[j] * apart : apart;
        outputs.v[j] = twice * weighed;
        sum += weighed * apart;
      }
      store(slope + i, outputs);
    });
    sum = team_sum<team>(sum);
    if (threadIdx.x % team == 0) a.partial[job] = sum;
  });
}

}  // namespace

void fisher_loss(const FisherLossArgs& a) {
  with_float(a.type, [&](auto kind) {
    using T = decltype(kind);
    with_chunks(1, a.n, [&](int64_t blocks, auto team) {
      launch("fisher_loss", a.weight ? fisher_loss_kernel<team, T, true> : fisher_loss_kernel<team, T, false>, blocks,
             a);
    });
  });
  finish_sums("fisher_loss", a.partial, 1, a.n, a.scale, a.out);
}

}  // namespace qk::cuda
