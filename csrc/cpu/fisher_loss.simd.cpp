#include "ops/fisher_loss.h"

#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

template <bool weighted>
float loss(const float* __restrict output, const float* __restrict target, const float* __restrict weight, int64_t n) {
  return sum_of(n, [=](int64_t i) {
    const float d = output[i] - target[i];
    return weighted ? weight[i] * (d * d) : d * d;
  });
}

template <bool weighted>
void gradients(const float* __restrict output, const float* __restrict target, const float* __restrict weight,
               float* __restrict grad_output, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float d = output[i] - target[i];
    grad_output[i] = scale * (weighted ? weight[i] * d : d);
  }
}

}  // namespace

void fisher_loss(const FisherLossArgs& a) {
  each_chunk(1, a.n, [&](int64_t, int64_t at, int64_t n, int64_t job) {
    a.partial[job] = a.weight ? loss<true>(a.output + at, a.target + at, a.weight + at, n)
                              : loss<false>(a.output + at, a.target + at, nullptr, n);
  });
  *a.out = a.scale * total(a.partial, sum_chunks(a.n));
}

void fisher_loss_backward(const FisherLossBackwardArgs& a) {
  const float scale = 2.0f * a.scale * *a.grad;
  each_chunk(1, a.n, [&](int64_t, int64_t at, int64_t n, int64_t) {
    if (a.weight)
      gradients<true>(a.output + at, a.target + at, a.weight + at, a.grad_output + at, n, scale);
    else
      gradients<false>(a.output + at, a.target + at, nullptr, a.grad_output + at, n, scale);
  });
}

}  // namespace qk::cpu::QK_ISA
