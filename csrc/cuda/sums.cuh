// The second pass of a sum: the first left one partial sum for each chunk of a row, in the workspace of the call.
#pragma once
#include "cuda/rows.cuh"

namespace qk::cuda {

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
