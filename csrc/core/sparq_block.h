// SPARQ values at rest (docs/format.md): blocks of 16 values, each a window of N bits and which of the family's shifts
// it lies at. Static functions: files compiled per instruction set must not share copies. Needs a little-endian
// machine.
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

template <int N, int Stride, bool Pairs>
struct SparqBlock {
  static constexpr int bits = N, stride = Stride;
  static constexpr bool pairs = Pairs;
  static constexpr int values = sparq_block_values, shift_bits = sparq_shift_bits(N, Stride);
  static constexpr int window_bytes = 2 * N, shift_bytes = 2 * shift_bits;
  static constexpr int bytes = sparq_block_bytes(N, Stride, Pairs);
  static constexpr int mask = (1 << N) - 1;

  // How many steps of S the window of W bits moves up until it holds the value's top bit.
  template <int W, int S>
  static QK_HD inline uint8_t steps(uint8_t value) {
    uint8_t n = 0;
    for (int at = W; at < 8; at += S) n += (value >> at) != 0;
    return n;
  }

  // Bits that no window holds are lost: returned, OR of all. A pair with one 0 gives its bits to the other value: the
  // low half of its window, then the high one; the first shift is its, the second says which of the two it is.
  static QK_HD inline uint8_t pack(const uint8_t* codes, uint8_t* out) {
    uint8_t window[values], shift[values], rest[values], split = 0, lost = 0;
    for (int i = 0; i < values; ++i) {
      shift[i] = steps<N, Stride>(codes[i]);
      window[i] = static_cast<uint8_t>(codes[i] >> shift[i] * Stride);
      rest[i] = static_cast<uint8_t>(codes[i] ^ window[i] << shift[i] * Stride);
    }
    if constexpr (Pairs) {
      for (int i = 0; i < values; i += 2) {
        const bool one = (codes[i] == 0) != (codes[i + 1] == 0);
        const uint8_t value = codes[i] | codes[i + 1], up = steps<2 * N, 1>(value);
        const uint8_t wide = static_cast<uint8_t>(value >> up);
        window[i] = one ? wide & mask : window[i], window[i + 1] = one ? wide >> N : window[i + 1];
        shift[i] = one ? up : shift[i], shift[i + 1] = one ? codes[i] == 0 : shift[i + 1];
        rest[i] = one ? static_cast<uint8_t>(value ^ wide << up) : rest[i], rest[i + 1] = one ? 0 : rest[i + 1];
        split |= static_cast<uint8_t>(one << i / 2);
      }
    }
    for (int i = 0; i < values; ++i) lost |= rest[i];
    for (int half = 0; half < 2; ++half) {
      put<N>(window + 8 * half, out + N * half);
      put<shift_bits>(shift + 8 * half, out + window_bytes + shift_bits * half);
    }
    if constexpr (Pairs) out[window_bytes + shift_bytes] = split;
    return lost;
  }

  static QK_HD inline void unpack(const uint8_t* in, uint8_t* codes) {
    uint8_t window[values], shift[values];
    for (int half = 0; half < 2; ++half) {
      get<N>(in + N * half, window + 8 * half);
      get<shift_bits>(in + window_bytes + shift_bits * half, shift + 8 * half);
    }
    for (int i = 0; i < values; ++i) codes[i] = static_cast<uint8_t>(window[i] << shift[i] * Stride);
    if constexpr (Pairs) {
      const uint8_t split = in[window_bytes + shift_bytes];
      for (int i = 0; i < values; i += 2) {
        const bool one = split >> i / 2 & 1, second = shift[i + 1] & 1;
        const uint8_t value = static_cast<uint8_t>((window[i] | window[i + 1] << N) << shift[i]);
        codes[i] = !one ? codes[i] : second ? 0 : value;
        codes[i + 1] = !one ? codes[i + 1] : second ? value : 0;
      }
    }
  }

 private:
  // The low B bits of 8 bytes as B bytes, value i at bit i * B, and back.
  template <int B>
  static QK_HD inline void put(const uint8_t* fields, uint8_t* out) {
    uint64_t x;
    memcpy(&x, fields, 8);
    x = (x | x >> (8 - B)) & each(16, 2 * B);
    x = (x | x >> (16 - 2 * B)) & each(32, 4 * B);
    x = x | x >> (32 - 4 * B);
    memcpy(out, &x, B);
  }
  template <int B>
  static QK_HD inline void get(const uint8_t* in, uint8_t* fields) {
    uint64_t x = 0;
    memcpy(&x, in, B);
    x = (x | x << (32 - 4 * B)) & each(32, 4 * B);
    x = (x | x << (16 - 2 * B)) & each(16, 2 * B);
    x = (x | x << (8 - B)) & each(8, B);
    memcpy(fields, &x, 8);
  }
  // Ones in the low `ones` bits of each `width` bits.
  static QK_HD constexpr uint64_t each(int width, int ones) {
    uint64_t bits = 0;
    for (int at = 0; at < 64; at += width) bits |= ((uint64_t{1} << ones) - 1) << at;
    return bits;
  }
};

// f(SparqBlock) of a family that is one.
template <class F>
static inline void with_sparq_block(int bits, int stride, bool pairs, F&& f) {
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

}  // namespace qk
