#include "ops/soft_round.h"

#include "core/math.h"
#include "cuda/floats.cuh"
#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

// floor(weight / step) + h(v), the code less the zero.
__device__ float units(float weight, float u, Row r) {
  return floorf(limit(weight * r.inverse, r.low - 2, r.high + 2)) + soft_fraction(u);
}

template <int team, class T>
__global__ void soft_round_kernel(SoftRoundArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const T *weight = static_cast<const T*>(a.weight) + at, *v = static_cast<const T*>(a.v) + at;
    T* out = static_cast<T*>(a.out) + at;
    each_value<team, together<T>>(count, values_before<together<T>>(weight, v, out), [&](int64_t i, auto width) {
      const auto vs = load_floats<width>(v + i);
      auto weights = load_floats<width>(weight + i);
#pragma unroll
      for (int j = 0; j < width; ++j)
        weights.v[j] = limit(units(weights.v[j], soft_sign(vs.v[j]), r), r.low, r.high) * r.step;
      store_floats(out + i, weights);
    });
  });
}

template <int team, class T, bool penalized>
__global__ void soft_round_backward_kernel(SoftRoundBackwardArgs a) {
  const float beta = penalized ? a.penalty[1] : 1.0f;
  const float scale = penalized ? -2.0f * beta * a.penalty[0] : 0.0f;
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const T *grad = static_cast<const T*>(a.grad) + at, *weight = static_cast<const T*>(a.weight) + at;
    const T* v = static_cast<const T*>(a.v) + at;
    T* grad_v = static_cast<T*>(a.grad_v) + at;
    const int before = values_before<together<T>>(grad, weight, v, grad_v);
    each_value<team, together<T>>(count, before, [&](int64_t i, auto width) {
      const auto weights = load_floats<width>(weight + i), vs = load_floats<width>(v + i);
      auto grads = load_floats<width>(grad + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float u = soft_sign(vs.v[j]), t = units(weights.v[j], u, r), slope = soft_slope(u);
        const float own = t >= r.low && t <= r.high ? grads.v[j] * r.step * slope : 0.0f;
        grads.v[j] = penalized ? own + scale * penalty_slope(u, slope, beta) : own;
      }
      store_floats(grad_v + i, grads);
    });
  });
}

}  // namespace

void soft_round(const SoftRoundArgs& a) {
  with_float(a.type, [&](auto kind) {
    with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) {
      launch("soft_round", soft_round_kernel<team, decltype(kind)>, blocks, a);
    });
  });
}

void soft_round_backward(const SoftRoundBackwardArgs& a) {
  with_float(a.type, [&](auto kind) {
    using T = decltype(kind);
    with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) {
      launch("soft_round_backward",
             a.penalty ? soft_round_backward_kernel<team, T, true> : soft_round_backward_kernel<team, T, false>, blocks,
             a);
    });
  });
}

}  // namespace qk::cuda
