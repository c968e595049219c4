#include "ops/fisher_loss.h"

#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team, bool weighted>
__global__ void fisher_loss_kernel(FisherLossArgs a) {
  const float twice = 2.0f * a.scale;
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t job) {
    const float *output = a.output + at, *target = a.target + at, *weight = weighted ? a.weight + at : output;
    float *slope = a.slope + at, sum = 0;
    each_value<team, 4>(count, values_before<4>(output, target, weight, slope), [&](int64_t i, auto width) {
      const auto targets = load<width>(target + i), weights = load<width>(weight + i);
      auto outputs = load<width>(output + i);
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
  with_chunks(1, a.n, [&](int64_t blocks, auto team) {
    launch("fisher_loss", a.weight ? fisher_loss_kernel<team, true> : fisher_loss_kernel<team, false>, blocks, a);
  });
  finish_sums("fisher_loss", a.partial, 1, a.n, a.scale, a.out);
}

}  // namespace qk::cuda
