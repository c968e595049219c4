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

// clamp(round(x / step) + zero, 0, top); NaN gives zero. A zero outside [0, top] gives some code, never a fault.
__device__ inline uint8_t code_of(float x, Row r) {
  return static_cast<uint8_t>(static_cast<int>(rintf(clamp_units(__fmul_rn(x, r.inverse), r.low, r.high)) - r.low));
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

}  // namespace qk::cuda
