#include "ops/lsq.h"

#include "cuda/floats.cuh"
#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team, class T>
__global__ void lsq_kernel(LsqArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const T* x = static_cast<const T*>(a.x) + at;
    T* out = static_cast<T*>(a.out) + at;
    each_value<team, together<T>>(count, values_before<together<T>>(x, out), [&](int64_t i, auto width) {
      auto v = load_floats<width>(x + i);
#pragma unroll
      for (float& value : v.v) value = rintf(clamp_units(value * r.inverse, r.low, r.high)) * r.step;
      store_floats(out + i, v);
    });
  });
}

// d out / d step is round(t) - t inside, the limit outside; d out / d x is 1 inside, 0 outside (LSQ, section 2.1).
template <int team, class T, bool by_code>
__global__ void lsq_backward_kernel(LsqBackwardArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t job) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const T *grad = static_cast<const T*>(a.grad) + at, *x = static_cast<const T*>(a.x) + at;
    T* grad_x = static_cast<T*>(a.grad_x) + at;
    float sum = 0;
    each_value<team, together<T>>(count, values_before<together<T>>(grad, x, grad_x), [&](int64_t i, auto width) {
      const auto xs = load_floats<width>(x + i);
      auto grads = load_floats<width>(grad + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float t = xs.v[j] * r.inverse, code = rintf(clamp_units(t, r.low, r.high));
        const bool inside = by_code ? rintf(t) >= r.low && rintf(t) <= r.high : t > r.low && t < r.high;
        sum += grads.v[j] * (inside ? code - t : code);  // code is 0 for NaN
        grads.v[j] = inside ? grads.v[j] : 0.0f;
      }
      store_floats(grad_x + i, grads);
    });
    sum = team_sum<team>(sum);
    if (threadIdx.x % team == 0) a.partial[job] = sum;
  });
}

}  // namespace

void lsq(const LsqArgs& a) {
  with_float(a.type, [&](auto kind) {
    with_chunks(a.rows, a.cols,
                [&](int64_t blocks, auto team) { launch("lsq", lsq_kernel<team, decltype(kind)>, blocks, a); });
  });
}

void lsq_backward(const LsqBackwardArgs& a) {
  with_float(a.type, [&](auto kind) {
    using T = decltype(kind);
    with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) {
      launch("lsq_backward",
             a.inside_by_code ? lsq_backward_kernel<team, T, true> : lsq_backward_kernel<team, T, false>, blocks, a);
    });
  });
  finish_sums("lsq_backward", a.partial, a.rows, a.cols, a.grad_scale, a.grad_step);
}

}  // namespace qk::cuda
