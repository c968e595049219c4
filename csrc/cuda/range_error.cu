#include "ops/range_error.h"

#include "core/math.h"
#include "cuda/floats.cuh"
#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

// A block keeps a chunk of x in shared memory; each of its warps tries every eighth candidate on it.
template <class T>
__global__ void range_error_kernel(RangeErrorArgs a, int64_t chunks) {
  __shared__ float values[range_error_chunk];
  each_job<block_threads>(a.rows * chunks, [&](int64_t job) {
    const int64_t row = job / chunks, col = job % chunks * range_error_chunk;
    const int count = least(range_error_chunk, a.cols - col), lane = threadIdx.x % 32;
    __syncthreads();  // the last job's values have been used
    const T* x = static_cast<const T*>(a.x) + row * a.cols + col;
    each_value<block_threads, together<T>>(count, values_before<together<T>>(x), [&](int64_t i, auto width) {
      const auto found = load_floats<width>(x + i);
#pragma unroll
      for (int j = 0; j < width; ++j) values[i + j] = found.v[j];
    });
    __syncthreads();
    for (int64_t candidate = threadIdx.x / 32; candidate < a.candidates; candidate += block_threads / 32) {
      const int64_t at = row * a.candidates + candidate;
      const Row r = row_of(a.step[at], a.zero[at], a.bits);
      float sum = 0;  // of at most 128 values; chunks and lanes are added in double
      for (int i = lane; i < count; i += 32) {
        const float x = values[i];
        const float apart = fabsf(rintf(clamp_units(x * r.inverse, r.low, r.high)) * r.step - x);
        sum += a.power == 1.0f ? apart : a.power == 2.0f ? apart * apart : power_of(apart, a.power);
      }
      const double total = team_sum<32>(static_cast<double>(sum));
      if (lane == 0) a.partial[job * a.candidates + candidate] = total;
    }
  });
}

__global__ void add_chunks(RangeErrorArgs a, int64_t chunks) {
  each_job<32>(a.rows * a.candidates, [&](int64_t job) {
    const int64_t row = job / a.candidates, candidate = job % a.candidates;
    double sum = 0;
    for (int64_t i = threadIdx.x % 32; i < chunks; i += 32)
      sum += a.partial[(row * chunks + i) * a.candidates + candidate];
    sum = team_sum<32>(sum);
    if (threadIdx.x % 32 == 0) a.out[job] = static_cast<float>(sum);
  });
}

}  // namespace

void range_error(const RangeErrorArgs& a) {
  const int64_t chunks = range_error_chunks(a.cols);
  with_float(a.type, [&](auto kind) {
    launch("range_error", range_error_kernel<decltype(kind)>, a.candidates ? a.rows * chunks : 0, a, chunks);
  });
  launch("range_error", add_chunks, ceil_div(a.rows * a.candidates, block_threads / 32), a, chunks);
}

}  // namespace qk::cuda
