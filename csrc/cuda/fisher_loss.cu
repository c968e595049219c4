#include "ops/fisher_loss.h"

#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team, bool weighted>
__global__ void fisher_loss_kernel(FisherLossArgs a) {
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t job) {
    const float *output = a.output + at, *target = a.target + at, *weight = weighted ? a.weight + at : output;
    float sum = 0;
    each_value<team, 4>(count, values_before<4>(output, target, weight), [&](int64_t i, auto width) {
      const auto outputs = load<width>(output + i), targets = load<width>(target + i),
                 weights = load<width>(weight + i);
      for (int j = 0; j < width; ++j) {
        const float apart = outputs.v[j] - targets.v[j];
        sum += weighted ? weights.v[j] * (apart * apart) : apart * apart;
      }
    });
    sum = team_sum<team>(sum);
    if (threadIdx.x % team == 0) a.partial[job] = sum;
  });
}

template <int team, bool weighted>
__global__ void fisher_loss_backward_kernel(FisherLossBackwardArgs a) {
  const float scale = 2.0f * a.scale * *a.grad;
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t) {
    const float *output = a.output + at, *target = a.target + at, *weight = weighted ? a.weight + at : output;
    float* grad_output = a.grad_output + at;
    each_value<team, 4>(count, values_before<4>(output, target, weight, grad_output), [&](int64_t i, auto width) {
      const auto targets = load<width>(target + i), weights = load<width>(weight + i);
      auto outputs = load<width>(output + i);
      for (int j = 0; j < width; ++j) {
        const float apart = outputs.v[j] - targets.v[j];
        outputs.v[j] = scale * (weighted ? weights.v[j] * apart : apart);
      }
      store(grad_output + i, outputs);
    });
  });
}

}  // namespace

void fisher_loss(const FisherLossArgs& a) {
  with_chunks(1, a.n, [&](int64_t blocks, auto team) {
    launch("fisher_loss", a.weight ? fisher_loss_kernel<team, true> : fisher_loss_kernel<team, false>, blocks, a);
  });
  finish_sums("fisher_loss", a.partial, 1, a.n, a.scale, a.out);
}

void fisher_loss_backward(const FisherLossBackwardArgs& a) {
  with_chunks(1, a.n, [&](int64_t blocks, auto team) {
    launch("fisher_loss_backward",
           a.weight ? fisher_loss_backward_kernel<team, true> : fisher_loss_backward_kernel<team, false>, blocks, a);
  });
}

}  // namespace qk::cuda
