// What the kernels share whose tensors are seen as rows with one step and zero each (docs/numerics.md).
#pragma once
#include "core/chunks.h"
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

// f(row, at, count, job) for each chunk of a row: values at .. at + count - 1 of the whole tensor, by one team.
template <int team, class F>
__device__ void each_chunk(int64_t rows, int64_t cols, const F& f) {
  const int64_t chunks = sum_chunks(cols);
  each_job<team>(rows * chunks, [&](int64_t job) {
    const int64_t row = job / chunks, col = job % chunks * sum_chunk;
    f(row, row * cols + col, least(sum_chunk, cols - col), job);
  });
}

// f(blocks, integral_constant<team>) for a kernel that uses each_chunk<team>.
template <class F>
void with_chunks(int64_t rows, int64_t cols, const F& f) {
  with_team(rows * sum_chunks(cols), cols, f);
}

// result[row] = scale * sum of the row's partial sums, in double and in a fixed order.
static __global__ void add_partials(const float* __restrict__ partial, int64_t rows, int64_t chunks, float scale,
                                    float* result) {
  each_job<32>(rows, [&](int64_t row) {
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) sum += partial[row * chunks + i];
    sum = team_sum<32>(sum);
    if (threadIdx.x % 32 == 0) result[row] = static_cast<float>(sum) * scale;
  });
}

inline void finish_sums(const char* op, const float* partial, int64_t rows, int64_t cols, float scale, float* result) {
  launch(op, add_partials, ceil_div(rows, block_threads / 32), partial, rows, sum_chunks(cols), scale, result);
}

}  // namespace qk::cuda
