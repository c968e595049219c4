// What every kernel file shares: the launch with its error, loops with 16-byte accesses, sums in a fixed order. A
// launcher allocates nothing and waits for nothing, so that CUDA graphs can record it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/layout.h"
#include "cuda/stream.h"

namespace qk::cuda {

constexpr int block_threads = 256;
// More work than this is walked in strides of the grid, on the host nearly all.
#if defined(QK_EMULATED)
constexpr int64_t most_blocks = 3;
#else
constexpr int64_t most_blocks = 1 << 16;
#endif

QK_HD constexpr int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }

// Nothing to do launches nothing: a grid of 0 blocks is an error.
template <class... Parameters, class... Given>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, const Given&... args) {
  if (blocks <= 0) return;
  const unsigned grid = static_cast<unsigned>(least(blocks, most_blocks));
#if defined(QK_EMULATED)
  emulated::run(grid, block_threads, [&] { kernel(args...); });
#else
  // clang-format off
  kernel<<<grid, block_threads, 0, current_stream(op)>>>(args...);
  // clang-format on
  check_launch(op);
#endif
}

// A team is the threads that share a job: a warp for short jobs, a block for long ones. f(job) runs for each job, for
// all threads of a team at once, so that it may hold a barrier of the team.
template <int team, class F>
__device__ void each_job(int64_t jobs, const F& f) {
  static_assert(team == 32 || team == block_threads, "a warp or a block");
  constexpr int teams = block_threads / team;
  const int64_t step = int64_t{gridDim.x} * teams;
  for (int64_t job = int64_t{blockIdx.x} * teams + threadIdx.x / team; job < jobs; job += step) f(job);
}

// Blocks for `jobs` of `values` each, and the team that suits them: f(blocks, integral_constant<team>).
template <class F>
void with_team(int64_t jobs, int64_t values, const F& f) {
  if (values >= 1024) return f(jobs, std::integral_constant<int, block_threads>{});
  f(ceil_div(jobs, block_threads / 32), std::integral_constant<int, 32>{});
}

template <class T, int n>
struct alignas(sizeof(T) * n) Values {
  T v[n];
};

template <int n, class T>
__device__ Values<T, n> load(const T* p) {
  return *reinterpret_cast<const Values<T, n>*>(p);
}
template <int n, class T>
__device__ void store(T* p, const Values<T, n>& values) {
  *reinterpret_cast<Values<T, n>*>(p) = values;
}

// Values before the first boundary at which every pointer can be read n values at a time; -1 if there is none.
template <int n, class T, class... Others>
__device__ int values_before(const T* first, const Others*... others) {
  const auto place = [](auto* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(*p) % n); };
  const int at = place(first);
  return ((place(others) == at) && ...) ? (n - at) % n : -1;
}

// f(i, integral_constant<w>) handles values i .. i + w - 1 of [0, count): w = n from the boundary on, 1 elsewhere.
template <int team, int n, class F>
__device__ void each_value(int64_t count, int before, const F& f) {
  const int lane = threadIdx.x % team;
  const int64_t head = before < 0 ? count : least(before, count), whole = (count - head) / n;
  for (int64_t i = lane; i < head; i += team) f(i, std::integral_constant<int, 1>{});
  for (int64_t i = lane; i < whole; i += team) f(head + i * n, std::integral_constant<int, n>{});
  for (int64_t i = head + whole * n + lane; i < count; i += team) f(i, std::integral_constant<int, 1>{});
}

// The sum over a team, in its first thread, always in the same order.
template <int team, class T>
__device__ T team_sum(T sum) {
  for (int apart = 16; apart; apart /= 2) sum += __shfl_down_sync(0xffffffffu, sum, apart);
  if constexpr (team > 32) {
    __shared__ T warps[team / 32];
    __syncthreads();  // the last job's sums have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int i = 1; i < team / 32; ++i) sum += warps[i];
  }
  return sum;
}

// combine(...) of the values of a team, in all of its threads. For operations whose order does not matter.
template <int team, class T, class F>
__device__ T team_all(T value, const F& combine) {
  for (int apart = 16; apart; apart /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, apart));
  if constexpr (team > 32) {
    __shared__ T warps[team / 32];
    __syncthreads();  // the last call's values have been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < team / 32; ++i) value = combine(value, warps[i]);
  }
  return value;
}

}  // namespace qk::cuda
