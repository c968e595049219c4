// SPARQ values at rest (docs/format.md): blocks of 16 values, each a window of N bits and which of the family's shifts
// it lies at. For little-endian machines.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bits.h"

namespace qk {

constexpr int64_t sparq_block_values = 16;

QK_HD constexpr bool is_sparq_family(int64_t bits, int64_t stride) {
  return (bits >= 2 && bits <= 4 && stride == 1) || (bits == 4 && (stride == 2 || stride == 4));
}

// Bits that name one of the shifts 0, stride, ... up to 8 - bits.
QK_HD constexpr int sparq_shift_bits(int bits, int stride) {
  const int shifts = (8 - bits) / stride + 1;
  return shifts > 4 ? 3 : shifts > 2 ? 2 : 1;
}

QK_HD constexpr int64_t sparq_block_bytes(int bits, int stride, bool pairs) {
  return 2 * (bits + sparq_shift_bits(bits, stride)) + pairs;
}

QK_HD constexpr int64_t sparq_row_bytes(int64_t cols, int bits, int stride, bool pairs) {
  return (cols / sparq_block_values + (cols % sparq_block_values != 0)) * sparq_block_bytes(bits, stride, pairs);
}

namespace {  // files compiled per instruction set must not share copies

template <int N, int Stride, bool Pairs>
struct SparqBlock {
  static constexpr int bits = N, stride = Stride;
  static constexpr bool pairs = Pairs;
  static constexpr int values = sparq_block_values, shift_bits = sparq_shift_bits(N, Stride);
  static constexpr int window_bytes = 2 * N, shift_bytes = 2 * shift_bits;
  static constexpr int bytes = sparq_block_bytes(N, Stride, Pairs);

  // Eight values at a time, as the bytes of a word; no operation carries from one into the next.
  using Bytes = uint64_t;
  // Half a block: its fields in their low bits, and what no window holds.
  struct Half {
    Bytes window, shift, split, lost;
  };

  // A pair with one 0 gives its bits to the other value: the low half of its window, then the high one; the first shift
  // is its, the second says which of the two it is.
  static QK_HD constexpr Half pack(Bytes code) {
    const Bytes steps = steps_up<N, Stride>(filled(code));
    Bytes window = down<N, Stride>(code, steps), shift = sum_of(steps), split = 0;
    Bytes lost = code ^ up<Stride>(window, shift);
    if constexpr (Pairs) {
      const Bytes some = filled(code) & ones, one = all_of(some ^ swapped(some));
      const Bytes value = code | swapped(code), wide_steps = steps_up<2 * N, 1>(filled(value));
      const Bytes wide = down<2 * N, 1>(value, wide_steps), wide_shift = sum_of(wide_steps);
      window = chosen(one, chosen(seconds, wide >> N & each(8, N), wide & each(8, N)), window);
      shift = chosen(one, chosen(seconds, some, wide_shift), shift);
      lost = chosen(one, value ^ up<1>(wide, wide_shift), lost);
      split = joined_pairs(one & firsts & ones);
    }
    return {joined<N>(window), joined<shift_bits>(shift), split, lost};
  }

  static QK_HD constexpr Bytes unpack(const Half& half) {
    const Bytes window = parted<N>(half.window), shift = parted<shift_bits>(half.shift);
    const Bytes code = up<Stride>(window, shift);
    if constexpr (!Pairs) return code;
    const Bytes flags = parted_pairs(half.split), one = all_of(flags | flags << 8);
    const Bytes second = all_of(shift >> 8 & firsts & ones);  // in the first byte of a pair, as value
    const Bytes wide = (window & firsts) | (window >> 8 & firsts) << N;
    const Bytes value = up<1>(wide, shift & firsts) & firsts;
    return chosen(one, (value & ~second) | (value & second) << 8, code);
  }

  static QK_HD inline void store(const Half* halves, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      memcpy(out + N * half, &halves[half].window, N);
      memcpy(out + window_bytes + shift_bits * half, &halves[half].shift, shift_bits);
    }
    if constexpr (Pairs) out[window_bytes + shift_bytes] = static_cast<uint8_t>(halves[0].split | halves[1].split << 4);
  }
  static QK_HD inline void load(const uint8_t* in, Half* halves) {
    for (int half = 0; half < 2; ++half) {
      halves[half] = {};
      memcpy(&halves[half].window, in + N * half, N);
      memcpy(&halves[half].shift, in + window_bytes + shift_bits * half, shift_bits);
      if constexpr (Pairs) halves[half].split = in[window_bytes + shift_bytes] >> 4 * half & 15;
    }
  }

 private:
  // Ones in the low `count` bits of each `width` bits, a divisor of 64 below it.
  static QK_HD constexpr Bytes each(int width, int count) { return ~Bytes{0} / low(width) * low(count); }
  static QK_HD constexpr Bytes low(int bits) { return (Bytes{1} << bits) - 1; }
  static constexpr Bytes ones = 0x0101010101010101, firsts = 0x00ff00ff00ff00ff, seconds = ~firsts;

  static QK_HD constexpr Bytes all_of(Bytes flags) { return (flags << 8) - flags; }  // 1 -> 255
  static QK_HD constexpr Bytes chosen(Bytes mask, Bytes yes, Bytes no) { return (yes & mask) | (no & ~mask); }
  static QK_HD constexpr Bytes swapped(Bytes x) { return (x >> 8 & firsts) | (x & firsts) << 8; }
  // Every bit up to the highest one.
  static QK_HD constexpr Bytes filled(Bytes x) {
    x |= x >> 1 & each(8, 7);
    x |= x >> 2 & each(8, 6);
    return x | (x >> 4 & each(8, 4));
  }
  // Bit i: whether a window of W bits must move up a step of S for the (i + 1)th time to hold the top bit.
  template <int W, int S>
  static QK_HD constexpr Bytes steps_up(Bytes filled_value) {
    if constexpr (W >= 8)
      return 0;
    else
      return (filled_value >> W & ones) | steps_up<W + S, S>(filled_value) << 1;
  }
  static QK_HD constexpr Bytes sum_of(Bytes steps) {
    steps -= steps >> 1 & each(2, 1);
    steps = (steps & each(4, 2)) + (steps >> 2 & each(4, 2));
    return (steps + (steps >> 4)) & each(8, 4);
  }
  // As often as steps_up says.
  template <int W, int S>
  static QK_HD constexpr Bytes down(Bytes x, Bytes steps) {
    if constexpr (W >= 8)
      return x;
    else
      return down<W + S, S>(chosen(all_of(steps & ones), x >> S & each(8, 8 - S), x), steps >> 1);
  }
  // By n steps of S; n up to 7. What leaves the byte is lost.
  template <int S>
  static QK_HD constexpr Bytes up(Bytes x, Bytes n) {
    return up_once<4 * S>(up_once<2 * S>(up_once<S>(x, n), n >> 1), n >> 2);
  }
  template <int bits>
  static QK_HD constexpr Bytes up_once(Bytes x, Bytes flags) {
    if constexpr (bits >= 8)
      return x & ~all_of(flags & ones);
    else
      return chosen(all_of(flags & ones), (x & each(8, 8 - bits)) << bits, x);
  }
  // The low B bits of 8 bytes side by side, the first lowest; and back.
  template <int B>
  static QK_HD constexpr Bytes joined(Bytes x) {
    x = (x | x >> (8 - B)) & each(16, 2 * B);
    x = (x | x >> (16 - 2 * B)) & each(32, 4 * B);
    return (x | x >> (32 - 4 * B)) & low(8 * B);
  }
  template <int B>
  static QK_HD constexpr Bytes parted(Bytes x) {
    x = (x | x << (32 - 4 * B)) & each(32, 4 * B);
    x = (x | x << (16 - 2 * B)) & each(16, 2 * B);
    return (x | x << (8 - B)) & each(8, B);
  }
  // The same for bits 0, 16, 32 and 48.
  static QK_HD constexpr Bytes joined_pairs(Bytes x) {
    x = (x | x >> 15) & each(32, 2);
    return (x | x >> 30) & low(4);
  }
  static QK_HD constexpr Bytes parted_pairs(Bytes x) {
    x = (x | x << 30) & each(32, 2);
    return (x | x << 15) & each(16, 1);
  }
};

// f(SparqBlock) of a family that is one.
template <class F>
void with_sparq_block(int bits, int stride, bool pairs, F&& f) {
  const auto of = [&](auto n, auto step) {
    if (pairs)
      f(SparqBlock<n, step, true>{});
    else
      f(SparqBlock<n, step, false>{});
  };
  using std::integral_constant;
  if (bits == 2) return of(integral_constant<int, 2>{}, integral_constant<int, 1>{});
  if (bits == 3) return of(integral_constant<int, 3>{}, integral_constant<int, 1>{});
  if (stride == 1) return of(integral_constant<int, 4>{}, integral_constant<int, 1>{});
  if (stride == 2) return of(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  of(integral_constant<int, 4>{}, integral_constant<int, 4>{});
}

}  // namespace
}  // namespace qk
