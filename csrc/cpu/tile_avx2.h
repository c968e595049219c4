// The register tile of AVX2, which has no dot product of bytes that is exact for all of them: maddubs adds two products
// in 16 bits and saturates. So there are two tiles, each exact.
//  - Weights below 8 bits: their codes are small, and sums of several steps of K fit 16 bits. maddubs and one addition
//    a step, and now and then the 16-bit sums are added to the 32-bit ones. That is 2 instructions for 32 products,
//    where saturating int8 takes 3.
//  - 8 bits: x and weights as 16-bit words (madd): 4 instructions for 32 products. x comes as words, widened once for
//    all columns; the first tile of a column widens the weights and keeps them for the others.
#pragma once
#include "cpu/tile_args.h"

namespace qk::cpu::QK_ISA {
namespace {

// Steps whose sums of pairs of products fit 16 bits. Whatever the zero z of a channel is, the largest and the smallest
// sum of n steps lie n * 2 * 255 * (2^width - 1) apart, and the smallest is -n * 2 * 255 * z.
template <int width>
constexpr int64_t steps_in_16_bits = width == 2 ? 32 : 8;
static_assert(32 * 2 * 255 * 3 < 1 << 16 && 8 * 2 * 255 * 15 < 1 << 16, "all sums are within 2^16 values");

// What 16-bit sums start with, so that no sum leaves them: -2^15 less the smallest sum. zeros: of 16 channels; null for
// weights multiplied as codes from 0.
template <int width>
QK_INLINE Bytes start_of_sums(const uint8_t* zeros) {
  __m256i start[2];
  for (int i = 0; i < 2; ++i) {
    __m256i z = _mm256_setzero_si256();
    if (zeros) z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * i)));
    z = _mm256_or_si256(z, _mm256_slli_epi32(z, 16));
    const __m256i smallest = _mm256_set1_epi16(static_cast<int16_t>(steps_in_16_bits<width> * 2 * 255));
    start[i] = _mm256_add_epi16(_mm256_mullo_epi16(z, smallest), _mm256_set1_epi16(-32768));
  }
  return {start[0], start[1]};
}

// What a column holds after its pieces or those of one group of K: sums in memory, 32 bits.
template <int rows>
struct TileSums {
  int32_t* at;  // [rows][16]
  QK_INLINE void set(int i, __m256i v) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 8 * i), v); }
  QK_INLINE void add(int i, __m256i v) const {
    __m256i* const to = reinterpret_cast<__m256i*>(at + 8 * i);
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), v));
  }
};

// Codes of `width` bits, stored in B: 2, 4, or 8 for those that an earlier tile kept.
// zeros: of 16 channels, if they have been taken from the weights or, with `keep`, will be; else null.
template <int B, bool keep, int width, int rows>
QK_INLINE void narrow_pieces(const TileArgs& a, const Piece* pieces, int64_t count, const uint8_t* zeros,
                             const TileSums<rows>& sums, const uint8_t*& ahead) {
  constexpr int parts = 8 / B;
  constexpr int64_t most = steps_in_16_bits<width>, per_round = most / parts < 4 ? most / parts : 4;  // vectors
  const __m256i one = _mm256_set1_epi16(1);
  const Bytes start = start_of_sums<width>(zeros);
  Bytes zero{};
  if constexpr (keep) zero = spread16(zeros);
  // Each time that the 16-bit sums are added up, two of their starts are too much.
  int64_t additions = 0;
  for (int64_t i = 0; i < count; ++i) additions += ceil_div(round_up(pieces[i].n, 4) / 4, most);
  const __m256i times = _mm256_set1_epi32(-static_cast<int32_t>(additions));
  const __m256i first = _mm256_mullo_epi32(_mm256_madd_epi16(start.a, one), times);
  const __m256i second = _mm256_mullo_epi32(_mm256_madd_epi16(start.b, one), times);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) sums.set(2 * r, first), sums.set(2 * r + 1, second);
  const int64_t x_stride = a.x_stride;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* x = a.x + pieces[i].x;
    const uint8_t* w = a.weight + pieces[i].k * 2 * B;
    uint8_t* kept = keep ? a.kept + pieces[i].k * 16 : nullptr;
    for (int64_t left = round_up(pieces[i].n, 4) / 4; left > 0; left -= most) {
      __m256i acc[2 * rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) acc[2 * r] = start.a, acc[2 * r + 1] = start.b;
      // rest: codes of the last step, if it is not whole and its weights are kept; else 0.
      const auto vector = [&](int steps, int rest) __attribute__((always_inline)) {
        if constexpr (B < 8 && !keep && rows <= 2) __builtin_prefetch(w + 24 * 64, 0, 3);  // columns follow each other
        const Bytes all = load64(w);
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p) {
          if (p >= steps) break;
          Bytes weight = all;
          if constexpr (B < 8) weight = unpack<B>(all, p);
          if constexpr (keep) {
            weight = minus(weight, zero);
            if (rest > 0 && p + 1 == steps) weight = first_bytes(weight, rest);
            store64(kept + p * 64, weight);
          }
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r) {
            const Four codes = broadcast4(x + r * x_stride + 4 * p);
            acc[2 * r] = in_order(_mm256_add_epi16(acc[2 * r], _mm256_maddubs_epi16(codes, weight.a)));
            acc[2 * r + 1] = in_order(_mm256_add_epi16(acc[2 * r + 1], _mm256_maddubs_epi16(codes, weight.b)));
          }
        }
        x += 4 * parts, w += 64;
        if constexpr (keep) kept += 64 * parts;
      };
      const int rest = keep && left <= most ? static_cast<int>(pieces[i].n % 4) : 0;
      int64_t steps = least(left, most);
      for (; steps >= per_round * parts + (rest > 0); steps -= per_round * parts)
#pragma GCC unroll 4
        for (int u = 0; u < per_round; ++u) vector(parts, 0);
      for (; steps > 0; steps -= parts) vector(static_cast<int>(steps), steps <= parts ? rest : 0);
#pragma GCC unroll 16
      for (int r = 0; r < 2 * rows; ++r) sums.add(r, _mm256_madd_epi16(acc[r], one));
      __builtin_prefetch(ahead, 0, 2);
      ahead += 64;
    }
  }
}

// int8 weights, or 16-bit words that an earlier tile kept: of a step, the first two of K for 16 channels, then the
// others.
template <int B, bool keep, int rows>
QK_INLINE void word_pieces(const TileArgs& a, const Piece* pieces, int64_t count, const TileSums<rows>& sums,
                           const uint8_t*& ahead) {
  __m256i acc[2 * rows];
#pragma GCC unroll 16
  for (int r = 0; r < 2 * rows; ++r) acc[r] = _mm256_setzero_si256();
  const int64_t x_stride = a.x_stride;
  const auto step = [&](const uint8_t* x, const uint8_t* w, uint8_t* kept) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i first, second;  // of eight channels each
      if constexpr (B == 16) {
        first = load32(w + 64 * half), second = load32(w + 64 * half + 32);
      } else {
        const Bytes words = words_of_half(w, half);
        first = words.a, second = words.b;
      }
      if constexpr (keep) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept + 64 * half), first);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept + 64 * half + 32), second);
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const __m256i codes = broadcast4(x + r * x_stride + 4 * half);
        acc[2 * r] = in_order(_mm256_add_epi32(acc[2 * r], _mm256_madd_epi16(codes, first)));
        acc[2 * r + 1] = in_order(_mm256_add_epi32(acc[2 * r + 1], _mm256_madd_epi16(codes, second)));
      }
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* x = a.x + pieces[i].x;
    const uint8_t* w = a.weight + pieces[i].k * 2 * B;
    uint8_t* kept = keep ? a.kept + pieces[i].k * 32 : nullptr;
    int64_t steps = round_up(pieces[i].n, 4) / 4;
    for (; steps >= 2; steps -= 2) {
      step(x, w, kept);
      step(x + 8, w + 8 * B, kept + 128);
      x += 16, w += 16 * B;
      if constexpr (keep) kept += 256;
      __builtin_prefetch(ahead, 0, 2);
      ahead += 64;
    }
    if (steps > 0) step(x, w, kept);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 2 * rows; ++r) sums.set(r, acc[r]);
}

// int8 weights that are used once, a few rows: the four of a channel as neighbouring words, so that each channel has
// two sums until the end and nothing is shuffled.
template <int rows>
QK_INLINE void word_pieces_once(const TileArgs& a, const Piece* pieces, int64_t count, const TileSums<rows>& sums) {
  __m256i acc[rows][4];  // of four channels each
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_setzero_si256();
  const int64_t x_stride = a.x_stride;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* x = a.x + pieces[i].x;
    const uint8_t* w = a.weight + pieces[i].k * 16;
    for (int64_t left = round_up(pieces[i].n, 4); left > 0; left -= 4, x += 8, w += 64) {
      __builtin_prefetch(w + 24 * 64, 0, 3);  // columns follow each other
      __m256i codes[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        int64_t four;
        std::memcpy(&four, x + r * x_stride, 8);
        codes[r] = _mm256_set1_epi64x(four);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i weight = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * j)));
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
          acc[r][j] = in_order(_mm256_add_epi32(acc[r][j], _mm256_madd_epi16(codes[r], weight)));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sums.set(2 * r + i, _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][2 * i], acc[r][2 * i + 1]), 0xd8));
}

constexpr bool tile_starts = false, tile_moves = false;

// B: as stored where the tile reads it, 16 for words; width: of the codes.
template <int B, bool keep, int width, int rows, int blocks>
void tile(const TileArgs& a) {
  static_assert(blocks == 1, "the registers hold one block");
  alignas(32) int32_t own[rows * 16];
  const TileSums<rows> sums{a.k_groups == 1 ? a.acc : own};
  const int64_t groups = a.k_groups, pieces = groups == 1 ? a.piece_count : a.group_pieces;
  const uint8_t* ahead = a.ahead;
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (B == 8 && width == 8 && !keep && rows <= 2)
      word_pieces_once<rows>(a, a.pieces + g * pieces, pieces, sums);
    else if constexpr (width == 8)
      word_pieces<B, keep, rows>(a, a.pieces + g * pieces, pieces, sums, ahead);
    else
      narrow_pieces<B, keep, width, rows>(a, a.pieces + g * pieces, pieces, B == 8 || keep ? a.zeros + g * 16 : nullptr,
                                          sums, ahead);
    if (groups == 1) return;
    with_flags(a.terms.row_step, a.terms.zeros, [&](auto per_row, auto zeros) __attribute__((always_inline)) {
      for (int r = 0; r < rows; ++r) {
        float* y = a.y + r * 16;
        const Floats value = a.terms.template value<per_row, zeros>(load<Words>(own + r * 16), g, 0, r);
        store_some(y, load<Floats>(y) + value, block);
      }
    });
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
