#include "ops/soft_round.h"

#include "core/math.h"
#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

// floor(weight / step) + h(v), the code less the zero.
__device__ float units(float weight, float u, Row r) {
  return floorf(limit(weight * r.inverse, r.low - 2, r.high + 2)) + soft_fraction(u);
}

template <int team>
__global__ void soft_round_kernel(SoftRoundArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const float *weight = a.weight + at, *v = a.v + at;
    float* out = a.out + at;
    each_value<team, 4>(count, values_before<4>(weight, v, out), [&](int64_t i, auto width) {
      const auto vs = load<width>(v + i);
      auto weights = load<width>(weight + i);
#pragma unroll
      for (int j = 0; j < width; ++j)
        weights.v[j] = limit(units(weights.v[j], soft_sign(vs.v[j]), r), r.low, r.high) * r.step;
      store(out + i, weights);
    });
  });
}

template <int team, bool penalized>
__global__ void soft_round_backward_kernel(SoftRoundBackwardArgs a) {
  const float beta = penalized ? a.penalty[1] : 1.0f;
  const float scale = penalized ? -2.0f * beta * a.penalty[0] : 0.0f;
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const float *grad = a.grad + at, *weight = a.weight + at, *v = a.v + at;
    float* grad_v = a.grad_v + at;
    each_value<team, 4>(count, values_before<4>(grad, weight, v, grad_v), [&](int64_t i, auto width) {
      const auto weights = load<width>(weight + i), vs = load<width>(v + i);
      auto grads = load<width>(grad + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float u = soft_sign(vs.v[j]), t = units(weights.v[j], u, r), slope = soft_slope(u);
        const float own = t >= r.low && t <= r.high ? grads.v[j] * r.step * slope : 0.0f;
        grads.v[j] = penalized ? own + scale * penalty_slope(u, slope, beta) : own;
      }
      store(grad_v + i, grads);
    });
  });
}

}  // namespace

void soft_round(const SoftRoundArgs& a) {
  with_chunks(a.rows, a.cols,
              [&](int64_t blocks, auto team) { launch("soft_round", soft_round_kernel<team>, blocks, a); });
}

void soft_round_backward(const SoftRoundBackwardArgs& a) {
  with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) {
    if (!a.penalty) {
      launch("soft_round_backward", soft_round_backward_kernel<team, false>, blocks, a);
    } else {
      launch("soft_round_backward", soft_round_backward_kernel<team, true>, blocks, a);
    }
  });
}

}  // namespace qk::cuda
