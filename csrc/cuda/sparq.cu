#include "ops/sparq.h"

#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

// The value in its window of `bits`: at the smallest multiple of stride that keeps its top bit, cut or rounded (ties to
// even) and held inside that window (SPARQ, section 3).
__device__ inline uint8_t window(int value, int bits, int stride, bool round) {
  const int over = 32 - __clz(value) - bits;  // bits that do not fit; __clz(0) is 32
  const int shift = over <= 0 ? 0 : (over + stride - 1) / stride * stride;
  int cut = value >> shift;
  if (round && shift > 0) {
    const int rest = value & ((1 << shift) - 1), half = 1 << (shift - 1);
    cut += rest > half || (rest == half && (cut & 1));
    cut = cut > top_code(bits) ? top_code(bits) : cut;
  }
  return static_cast<uint8_t>(cut << shift);
}

// With pairs, a value whose partner is 0 may use the bits of both: at any shift, whatever the stride.
__device__ inline uint8_t trim(int value, bool alone, bool round, const SparqArgs& a) {
  if (a.pairs && alone) return 2 * a.bits >= 8 ? value : window(value, 2 * a.bits, 1, round);
  return window(value, a.bits, a.stride, round);
}

// The distance from zero is cut, and cut off where rounding would leave the codes on that side.
__device__ inline uint8_t moved(int code, int partner, int zero, const SparqArgs& a) {
  const bool above = code >= zero, alone = partner == zero;
  const int distance = above ? code - zero : zero - code, room = above ? 255 - zero : zero;
  int kept = trim(distance, alone, a.round, a);
  if (kept > room) kept = trim(distance, alone, false, a);
  return static_cast<uint8_t>(above ? zero + kept : zero - kept);
}

template <int team>
__global__ void sparq_kernel(SparqArgs a) {
  const int zero = a.zero ? *a.zero & 255 : 0;
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const uint8_t* codes = a.codes + at;
    uint8_t* out = a.out + at;
    int before = values_before<16>(codes, out);
    if (before % 2) before = -1;  // 16 values at once must start with the first of a pair
    each_value<team, 16>(count, before, [&](int64_t i, auto width) {
      auto v = load<width>(codes + i);
      if constexpr (width == 1) {
        const int64_t partner = i ^ 1;  // chunks are even, so pairs never cross them
        v.v[0] = moved(v.v[0], partner < count ? codes[partner] : zero, zero, a);
      } else {
        const auto original = v;
#pragma unroll
        for (int j = 0; j < width; ++j) v.v[j] = moved(original.v[j], original.v[j ^ 1], zero, a);
      }
      store(out + i, v);
    });
  });
}

static_assert(sum_chunk % 2 == 0, "pairs never cross chunks");

}  // namespace

void sparq(const SparqArgs& a) {
  with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) { launch("sparq", sparq_kernel<team>, blocks, a); });
}

}  // namespace qk::cuda
