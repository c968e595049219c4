#include "ops/lsq.h"

#include "cuda/sums.cuh"

namespace qk::cuda {
namespace {

template <int team>
__global__ void lsq_kernel(LsqArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const float* x = a.x + at;
    float* out = a.out + at;
    each_value<team, 4>(count, values_before<4>(x, out), [&](int64_t i, auto width) {
      auto v = load<width>(x + i);
      for (float& value : v.v) value = rintf(clamp_units(value * r.inverse, r.low, r.high)) * r.step;
      store(out + i, v);
    });
  });
}

// d out / d step is round(t) - t inside, the limit outside; d out / d x is 1 inside, 0 outside (LSQ, section 2.1).
template <int team, bool by_code>
__global__ void lsq_backward_kernel(LsqBackwardArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t job) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const float *grad = a.grad + at, *x = a.x + at;
    float *grad_x = a.grad_x + at, sum = 0;
    each_value<team, 4>(count, values_before<4>(grad, x, grad_x), [&](int64_t i, auto width) {
      const auto xs = load<width>(x + i);
      auto grads = load<width>(grad + i);
      for (int j = 0; j < width; ++j) {
        const float t = xs.v[j] * r.inverse, code = rintf(clamp_units(t, r.low, r.high));
        const bool inside = by_code ? rintf(t) >= r.low && rintf(t) <= r.high : t > r.low && t < r.high;
        sum += grads.v[j] * (inside ? code - t : code);  // code is 0 for NaN
        grads.v[j] = inside ? grads.v[j] : 0.0f;
      }
      store(grad_x + i, grads);
    });
    sum = team_sum<team>(sum);
    if (threadIdx.x % team == 0) a.partial[job] = sum;
  });
}

}  // namespace

void lsq(const LsqArgs& a) {
  with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) { launch("lsq", lsq_kernel<team>, blocks, a); });
}

void lsq_backward(const LsqBackwardArgs& a) {
  with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) {
    launch("lsq_backward", a.inside_by_code ? lsq_backward_kernel<team, true> : lsq_backward_kernel<team, false>,
           blocks, a);
  });
  finish_sums("lsq_backward", a.partial, a.rows, a.cols, a.grad_scale, a.grad_step);
}

}  // namespace qk::cuda
