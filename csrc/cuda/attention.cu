#include "ops/attention.h"

#include "cuda/dot.cuh"
#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

constexpr int rows = block_threads / 32;  // queries of a block: each warp weighs the keys of one
constexpr int tile = 512;                 // keys at a time
constexpr int columns = 128;              // of a head's width at a time
constexpr int at_once = 16;               // keys of a warp
constexpr uint32_t middles = 0x80808080;  // codes - 128 are int8
constexpr int32_t unseen = INT32_MIN;     // the score of a key that a query does not see

struct Room {
  int32_t scores[rows][tile];
  alignas(16) uint32_t weights[rows][tile / 4];  // bytes
  int32_t sums[rows][columns];
};

// What a block works on: some queries of a head, some columns of its values.
struct Place {
  int64_t batch, head, query, column;
};

__device__ const uint8_t* row_of_head(const AttentionArgs& a, const Operand& o, int64_t row, int64_t head,
                                      int64_t length) {
  return static_cast<const uint8_t*>(o.data) + (row * a.heads + head) * length;
}

// 16 codes of a row, which begins where 16 bytes can be read; or 4, and 128 behind its end, which is 0 in a key.
template <bool whole>
constexpr int words = whole ? 4 : 1;
template <bool whole>
__device__ Values<uint32_t, words<whole>> some_codes(const uint8_t* row, int64_t i, int64_t length) {
  if constexpr (whole) return load<4>(reinterpret_cast<const uint32_t*>(row + i));
  uint32_t four = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) four |= (i + j < length ? row[i + j] : 128u) << (j * 8);
  return {{four}};
}

// Scores of keys first .. first + tile - 1, without what is the same for all keys of a query. A thread has a key.
template <bool whole>
__device__ void score(const AttentionArgs& a, const Place& place, int64_t first, Room& room) {
  const int last = static_cast<int>(least(rows, a.queries - place.query)) - 1;  // the rows behind it repeat it
  for (int j = threadIdx.x; j < tile && first + j < round_up(a.keys, at_once); j += block_threads) {
    int32_t scores[rows] = {}, sum = 0;
    const bool there = first + j < a.keys;
    if (there) {
      const uint8_t* const key = row_of_head(a, a.k, place.batch * a.keys + first + j, place.head, a.depth);
      const uint8_t* const query = row_of_head(a, a.q, place.batch * a.queries + place.query, place.head, a.depth);
      for (int64_t i = 0; i < a.depth; i += 4 * words<whole>) {
        auto k = some_codes<whole>(key, i, a.depth);
#pragma unroll
        for (int w = 0; w < words<whole>; ++w) {
          k.v[w] ^= middles;
          sum = dot4(0x01010101, k.v[w], sum);
        }
        const uint8_t* row = query;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const auto q = some_codes<whole>(row, i, a.depth);
#pragma unroll
          for (int w = 0; w < words<whole>; ++w) scores[r] = dot4(q.v[w], k.v[w], scores[r]);
          if (r < last) row += a.heads * a.depth;
        }
      }
    }
    const int64_t image = a.mask_batch == 1 ? 0 : place.batch, query = a.mask_rows == 1 ? 0 : place.query;
    const uint8_t* mask = a.mask ? a.mask + (image * a.mask_rows + query) * a.keys + first + j : nullptr;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      room.scores[r][j] = there && (!mask || *mask) ? scores[r] - *a.q.zero * sum : unseen;
      if (mask && a.mask_rows > 1 && r < last) mask += a.keys;
    }
  }
}

// 255 * 2^-t rounded, t = (top - s) * halvings: what is added to 1.5 * 2^23 is rounded to an integer in the lowest
// bits.
__device__ uint8_t weight_of(int32_t s, int32_t top, float halvings) {
  if (s == unseen) return 0;
  constexpr float magic = 0x1.8p23f;
  float t = __fmul_rn(static_cast<float>(top - s), halvings);
  t = t < farthest ? t : farthest;  // NaN too, 0 * inf
  const float shifted = __fadd_rn(t, magic), f = __fadd_rn(__fadd_rn(shifted, -magic), -t);
  float power = __fadd_rn(__fmul_rn(power_3, f), power_2);
  power = __fadd_rn(__fmul_rn(power, f), power_1);
  power = __fadd_rn(__fmul_rn(power, f), power_0);
  const float halved = __uint_as_float(__float_as_uint(power) - (__float_as_uint(shifted) << 23));
  return static_cast<uint8_t>(__float_as_uint(__fadd_rn(halved, magic)));
}

// sums += weights * (values - 128) of `count` keys: a warp takes 16 keys, a thread a column.
__device__ void add_values(const AttentionArgs& a, const Place& place, int64_t first, int count, Room& room) {
  for (int g = threadIdx.x / 32; g < ceil_div(count, at_once); g += block_threads / 32)
    for (int c = threadIdx.x % 32; c < columns && place.column + c < a.width; c += 32) {
      const int64_t key = first + g * at_once;
      const uint8_t* value = row_of_head(a, a.v, place.batch * a.keys + key, place.head, a.width) + place.column + c;
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (key + i < a.keys) words[i / 4] |= uint32_t{value[i * a.heads * a.width]} << (i % 4 * 8);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const Values<uint32_t, 4> weights = load<4>(room.weights[r] + g * 4);
        int32_t sum = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum = dot4(weights.v[w], words[w] ^ middles, sum);
        atomicAdd(&room.sums[r][c], sum);  // integers: any order
      }
    }
}

// A block makes a few queries' results. All scores of a query seldom fit: they are made once for the largest, then
// again for the weights; up to 512 keys they stay.
template <bool whole>
__global__ void __launch_bounds__(block_threads, 2) attention_kernel(AttentionArgs a) {
  __shared__ Room room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t parts = ceil_div(a.width, columns), groups = ceil_div(a.queries, rows);
  const float halvings = __fmul_rn(__fmul_rn(*a.q.step, *a.k.step), a.exponent);
  each_job<block_threads>(a.batch * a.heads * groups * parts, [&](int64_t job) {
    const int64_t head = job / parts / groups;
    const Place place{head / a.heads, head % a.heads, job / parts % groups * rows, job % parts * columns};
    __syncthreads();  // the last job's sums have been read
    for (int c = lane; c < columns; c += 32) room.sums[warp][c] = 0;
    int32_t top = unseen;
    for (int64_t first = 0; first < a.keys; first += tile) {
      __syncthreads();
      score<whole>(a, place, first, room);
      __syncthreads();
      for (int j = lane; j < least(tile, a.keys - first); j += 32)
        top = room.scores[warp][j] > top ? room.scores[warp][j] : top;
    }
    top = team_all<32>(top, [](int32_t x, int32_t y) { return x > y ? x : y; });
    int32_t total = 0;
    for (int64_t first = 0; first < a.keys; first += tile) {
      if (a.keys > tile) {
        __syncthreads();
        score<whole>(a, place, first, room);
        __syncthreads();
      }
      const int count = static_cast<int>(least(tile, a.keys - first));
      for (int j = lane; j < round_up(count, at_once); j += 32) {
        const uint8_t weight = weight_of(room.scores[warp][j], top, halvings);
        reinterpret_cast<uint8_t*>(room.weights[warp])[j] = weight;
        total += weight;
      }
      __syncthreads();
      add_values(a, place, first, count, room);
    }
    total = team_all<32>(total, [](int32_t x, int32_t y) { return x + y; });
    __syncthreads();
    const int64_t query = place.query + warp;
    if (query >= a.queries) return;
    const float ratio = total > 0 ? __fdiv_rn(*a.v.step, static_cast<float>(total)) : 0.0f;
    const uint32_t shift = static_cast<uint32_t>((128 - *a.v.zero) * total);
    const int64_t at = ((place.batch * a.queries + query) * a.heads + place.head) * a.width + place.column;
    for (int c = lane; c < least(columns, a.width - place.column); c += 32) {
      const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(room.sums[warp][c]) + shift);
      put(a.out, __fmul_rn(static_cast<float>(sum), ratio), at + c);
    }
  });
}

}  // namespace

void attention(const AttentionArgs& a) {
  const int64_t jobs = a.batch * a.heads * ceil_div(a.queries, rows) * ceil_div(a.width, columns);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.q.data) | reinterpret_cast<uintptr_t>(a.k.data);
  const bool whole = a.depth % at_once == 0 && addresses % at_once == 0;
  launch("attention", whole ? attention_kernel<true> : attention_kernel<false>, jobs, a);
}

}  // namespace qk::cuda
