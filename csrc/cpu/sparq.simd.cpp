#include "ops/sparq.h"

#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

// All arithmetic is on bytes. `drop` is 2^shift - 1, the bits below the window.
template <int N, int Stride>
inline uint8_t dropped(uint8_t filled) {
  if constexpr (N == 8) return 0;
  uint8_t drop = static_cast<uint8_t>(filled >> N);  // of a value with k bits: 2^(k - N) - 1
  if constexpr (Stride == 2) drop |= static_cast<uint8_t>(drop << 1) & 0x0a;
  if constexpr (Stride == 4) drop = drop ? 0x0f : 0;
  return drop;
}

template <int N>
inline uint8_t window_top(uint8_t drop) {  // (2^N - 1) << shift
  return static_cast<uint8_t>(static_cast<uint8_t>(drop << N) | ((1 << N) - 1)) & static_cast<uint8_t>(~drop);
}

// The value to its window of N bits, or of 2 N bits if it is wide.
template <int N, int Stride, bool Round>
inline uint8_t cut(uint8_t value, bool wide) {
  uint8_t filled = value | static_cast<uint8_t>(value >> 1);
  filled |= static_cast<uint8_t>(filled >> 2);
  filled |= static_cast<uint8_t>(filled >> 4);  // every bit up to the highest one
  const uint8_t narrow_drop = dropped<N, Stride>(filled), wide_drop = dropped<2 * N, 1>(filled);
  const uint8_t drop = wide ? wide_drop : narrow_drop;
  const uint8_t kept = value & static_cast<uint8_t>(~drop);
  if constexpr (!Round) return kept;
  // Up if the rest exceeds half of the window's unit, or equals it beside an odd kept value; never out of the window.
  const uint8_t top = wide ? window_top<2 * N>(wide_drop) : window_top<N>(narrow_drop);
  const uint8_t unit = static_cast<uint8_t>(drop + 1), rest = value & drop, half = unit >> 1;
  const uint8_t odd = (kept & unit) ? 1 : 0;
  const bool up = (static_cast<uint8_t>(rest + odd) > half) & (kept != top) & (drop != 0);
  return static_cast<uint8_t>(kept + (up ? unit : 0));
}

// Codes whose zero is 0.
struct Unsigned {
  static constexpr uint8_t zero = 0;

  template <int N, int Stride, bool Round>
  uint8_t moved(uint8_t code, bool wide) const {
    return cut<N, Stride, Round>(code, wide);
  }
};

// The distance from zero is cut, and cut off where rounding would leave the codes on that side.
struct Signed {
  uint8_t zero;

  template <int N, int Stride, bool Round>
  uint8_t moved(uint8_t code, bool wide) const {
    const bool above = code >= zero;
    const uint8_t distance = static_cast<uint8_t>(above ? code - zero : zero - code);
    uint8_t kept = cut<N, Stride, Round>(distance, wide);
    if constexpr (Round) {
      const uint8_t room = above ? static_cast<uint8_t>(255 - zero) : zero;
      kept = kept > room ? cut<N, Stride, false>(distance, wide) : kept;
    }
    return static_cast<uint8_t>(above ? zero + kept : zero - kept);
  }
};

template <int N, int Stride, bool Round, class Sign>
void cut_all(const uint8_t* __restrict codes, uint8_t* __restrict out, int64_t n, Sign sign) {
  for (int64_t i = 0; i < n; ++i) out[i] = sign.template moved<N, Stride, Round>(codes[i], false);
}

template <int N, int Stride, bool Round, class Sign>
void cut_pairs(const uint8_t* __restrict codes, uint8_t* __restrict out, int64_t n, Sign sign) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint8_t a = codes[2 * i], b = codes[2 * i + 1];
    out[2 * i] = sign.template moved<N, Stride, Round>(a, b == sign.zero);
    out[2 * i + 1] = sign.template moved<N, Stride, Round>(b, a == sign.zero);
  }
  if (n % 2) out[n - 1] = sign.template moved<N, Stride, Round>(codes[n - 1], true);
}

template <int N, int Stride, bool Round, class Sign>
void run(const SparqArgs& a, Sign sign) {
  static_assert(sum_chunk % 2 == 0, "a chunk never splits a pair");
  const bool joined = !a.pairs || a.cols % 2 == 0;  // no pair ends at a row's end: one long row
  each_chunk(joined ? 1 : a.rows, joined ? a.rows * a.cols : a.cols, [&](int64_t, int64_t at, int64_t n, int64_t) {
    if (a.pairs)
      cut_pairs<N, Stride, Round>(a.codes + at, a.out + at, n, sign);
    else
      cut_all<N, Stride, Round>(a.codes + at, a.out + at, n, sign);
  });
}

template <int N, int Stride>
void run(const SparqArgs& a) {
  const auto with_sign = [&](auto sign) { a.round ? run<N, Stride, true>(a, sign) : run<N, Stride, false>(a, sign); };
  a.zero && *a.zero ? with_sign(Signed{static_cast<uint8_t>(*a.zero)}) : with_sign(Unsigned{});
}

}  // namespace

void sparq(const SparqArgs& a) {
  if (a.bits == 2) return run<2, 1>(a);
  if (a.bits == 3) return run<3, 1>(a);
  if (a.stride == 1) return run<4, 1>(a);
  if (a.stride == 2) return run<4, 2>(a);
  run<4, 4>(a);
}

}  // namespace qk::cpu::QK_ISA
