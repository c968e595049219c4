// The products of attention: rows of codes with int8 that was packed a moment ago, in the order of dot.h.
#pragma once
#include <type_traits>

#include "cpu/vectors.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

#if defined(QK_ISA_AMX)
constexpr bool tiles = true;
#else
constexpr bool tiles = false;
#endif
constexpr int rows_at_once = tiles ? 16 : 4;

// Where products of bytes would saturate both sides are 16-bit words: of a step of 4, the first two of K for 16
// channels, then the others.
constexpr int wide = words_of_8_bits ? 2 : 1, step_bytes = 64 * wide;

// A vector in the order of dot.h, int8.
QK_INLINE void put_step(const uint8_t* bytes, uint8_t* to) {
#if defined(QK_ISA_AVX2)
  store64(to, words_of_half(bytes, 0));
  store64(to + 64, words_of_half(bytes, 1));
#else
  std::memcpy(to, bytes, 64);
#endif
}

// rows x blocks * 16 sums of codes x (rows x_stride bytes apart) with packed int8 w (blocks w_pitch apart).
template <int rows, int blocks>
QK_INLINE void small_product(const uint8_t* x, int64_t x_stride, const uint8_t* w, int64_t w_pitch, int64_t steps,
                             const int32_t* start, int32_t* out, int64_t out_stride) {
  Lanes acc[rows][blocks];
#pragma GCC unroll 4
  for (int c = 0; c < blocks; ++c) {
    const Lanes first = start ? load<Lanes>(start + c * block) : none();
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) acc[r][c] = first;
  }
  for (int64_t s = 0; s < steps; ++s) {
#if defined(QK_ISA_AVX2)
    static_assert(blocks == 1, "the registers hold one block");
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const at = w + s * step_bytes + 64 * half;
      const __m256i first = load32(at), second = load32(at + 32);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const __m256i codes = broadcast4(x + r * x_stride + 8 * s + 4 * half);
        acc[r][0].a = in_order(_mm256_add_epi32(acc[r][0].a, _mm256_madd_epi16(codes, first)));
        acc[r][0].b = in_order(_mm256_add_epi32(acc[r][0].b, _mm256_madd_epi16(codes, second)));
      }
    }
#else
    Bytes weights[blocks];
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) weights[c] = load64(w + c * w_pitch + s * step_bytes);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Four codes = broadcast4(x + r * x_stride + 4 * s);
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) acc[r][c] = dot4<false>(acc[r][c], codes, weights[c]);
    }
#endif
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) store(out + r * out_stride + c * block, acc[r][c]);
}

#if defined(QK_ISA_AMX)
// The same for up to 16 rows; steps are whole tiles of 16, and x is 64 bytes for each of these.
void all_products(TileState& state, int64_t rows, const uint8_t* x, int64_t x_stride, const uint8_t* w, int64_t w_pitch,
                  int64_t steps, int64_t blocks, const int32_t* start, int32_t* out, int64_t out_stride) {
  alignas(64) static constexpr int32_t nothing[side] = {};
  state.set_rows(rows);
  out_stride *= 4;
  for (int64_t c = 0; c < blocks; c += 4, w += 4 * w_pitch, out += 4 * block) {
    const int64_t there = least<int64_t>(4, blocks - c);
    const auto first = [&](int64_t i) { return start && i < there ? start + (c + i) * block : nothing; };
    load_tile<0>(first(0), 0);
    load_tile<1>(first(1), 0);
    load_tile<2>(first(2), 0);
    load_tile<3>(first(3), 0);
    for (int64_t s = 0; s < steps; s += side) {
      const uint8_t* const weights = w + s * step_bytes;
      load_tile<4>(x + 4 * s, x_stride);
      load_tile<6>(weights, 64);
      products<0, 4, 6>();
      if (there > 1) {
        load_tile<7>(weights + w_pitch, 64);
        products<1, 4, 7>();
      }
      if (there > 2) {
        load_tile<6>(weights + 2 * w_pitch, 64);
        products<2, 4, 6>();
      }
      if (there > 3) {
        load_tile<7>(weights + 3 * w_pitch, 64);
        products<3, 4, 7>();
      }
    }
    store_tile<0>(out, out_stride);
    if (there > 1) store_tile<1>(out + block, out_stride);
    if (there > 2) store_tile<2>(out + 2 * block, out_stride);
    if (there > 3) store_tile<3>(out + 3 * block, out_stride);
  }
}
#else
struct TileState {};

// The same for any number of rows and blocks.
void all_products(TileState&, int64_t rows, const uint8_t* x, int64_t x_stride, const uint8_t* w, int64_t w_pitch,
                  int64_t steps, int64_t blocks, const int32_t* start, int32_t* out, int64_t out_stride) {
  const auto some_rows = [&](auto count) __attribute__((always_inline)) {
    const auto some_blocks = [&](int64_t c, auto wide_by) __attribute__((always_inline)) {
      small_product<count, wide_by>(x, x_stride, w + c * w_pitch, w_pitch, steps, start ? start + c * block : nullptr,
                                    out + c * block, out_stride);
    };
    int64_t c = 0;
    if constexpr (most_blocks >= 4) {
      for (; c + 4 <= blocks; c += 4) some_blocks(c, std::integral_constant<int, 4>{});
      for (; c + 2 <= blocks; c += 2) some_blocks(c, std::integral_constant<int, 2>{});
    }
    for (; c < blocks; ++c) some_blocks(c, std::integral_constant<int, 1>{});
    x += count * x_stride, out += count * out_stride, rows -= count;
  };
  while (rows >= 4) some_rows(std::integral_constant<int, 4>{});
  while (rows > 0) some_rows(std::integral_constant<int, 1>{});
}
#endif

}  // namespace
}  // namespace qk::cpu::QK_ISA
