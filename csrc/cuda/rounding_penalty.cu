#include "ops/rounding_penalty.h"

#include "core/math.h"
#include "cuda/floats.cuh"
#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team, class T>
__global__ void rounding_penalty_kernel(RoundingPenaltyArgs a) {
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t job) {
    const T* v = static_cast<const T*>(a.v) + at;
    float sum = 0;
    each_value<team, together<T>>(count, values_before<together<T>>(v), [&](int64_t i, auto width) {
      const auto vs = load_floats<width>(v + i);
#pragma unroll
      for (float value : vs.v) sum += 1.0f - power_of(fabsf(soft_sign(value)), a.beta);
    });
    sum = team_sum<team>(sum);
    if (threadIdx.x % team == 0) a.partial[job] = sum;
  });
}

template <int team, class T>
__global__ void rounding_penalty_backward_kernel(RoundingPenaltyBackwardArgs a) {
  const float scale = -2.0f * a.beta * *a.grad;
  each_chunk<team>(1, a.n, [&](int64_t, int64_t at, int64_t count, int64_t) {
    const T* v = static_cast<const T*>(a.v) + at;
    T* grad_v = static_cast<T*>(a.grad_v) + at;
    each_value<team, together<T>>(count, values_before<together<T>>(v, grad_v), [&](int64_t i, auto width) {
      auto vs = load_floats<width>(v + i);
#pragma unroll
      for (float& value : vs.v) {
        const float u = soft_sign(value);
        value = scale * penalty_slope(u, soft_slope(u), a.beta);
      }
      store_floats(grad_v + i, vs);
    });
  });
}

}  // namespace

void rounding_penalty(const RoundingPenaltyArgs& a) {
  with_float(a.type, [&](auto kind) {
    with_chunks(1, a.n, [&](int64_t blocks, auto team) {
      launch("rounding_penalty", rounding_penalty_kernel<team, decltype(kind)>, blocks, a);
    });
  });
  finish_sums("rounding_penalty", a.partial, 1, a.n, 1.0f, a.out);
}

void rounding_penalty_backward(const RoundingPenaltyBackwardArgs& a) {
  with_float(a.type, [&](auto kind) {
    with_chunks(1, a.n, [&](int64_t blocks, auto team) {
      launch("rounding_penalty_backward", rounding_penalty_backward_kernel<team, decltype(kind)>, blocks, a);
    });
  });
}

}  // namespace qk::cuda
