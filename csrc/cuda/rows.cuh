// What the kernels share whose tensors are seen as rows with one step and zero each (docs/numerics.md).
#pragma once
#include "cuda/launch.cuh"

namespace qk::cuda {

// A row's step, and the limits of code - zero.
struct Row {
  float inverse, step, low, high;
};

__device__ inline Row row_of(float step, int32_t zero, int bits) {
  return {__frcp_rn(step), step, static_cast<float>(-zero), static_cast<float>(top_code(bits) - zero)};
}

// t within [low, high]; NaN gives 0, the code zero. Rounding afterwards is the same as before: the limits are integers.
__device__ inline float clamp_units(float t, float low, float high) {
  return t == t ? fminf(fmaxf(t, low), high) : 0.0f;
}

// result[row] = finish(sum of the row's partial sums), in double and in a fixed order.
template <class F>
__global__ void add_partials(const float* __restrict__ partial, int64_t rows, int64_t chunks, float* result, F finish) {
  each_job<32>(rows, [&](int64_t row) {
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) sum += partial[row * chunks + i];
    sum = team_sum<32>(sum);
    if (threadIdx.x % 32 == 0) result[row] = finish(sum);
  });
}

}  // namespace qk::cuda
