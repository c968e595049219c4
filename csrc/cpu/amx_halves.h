// Products of bfloat16 on tiles of registers: TDPBF16PS adds to 16 x 16 sums, in float32, the products of 16 rows of 32
// values with 32 values of 16 channels. Codes of weights become bfloat16, in which code - zero is exact.
#pragma once
#include "cpu/amx.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t halves_k = 32;  // values of K in a tile

template <int c, int a, int b>
QK_INLINE void products_of_halves() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// `vectors` of a block's codes (core/layout.h) as tiles: two rows of 64 bytes for each four codes, a row has two of
// each channel. zeros: of the 16 channels, for codes of less than 8 bits.
template <int B>
void unpack_halves(const uint8_t* codes, int64_t vectors, const uint8_t* zeros, uint8_t* to) {
  if constexpr (B == 8) {
    for (int64_t v = 0; v < vectors; ++v, to += 128) {
      const __m512i words = load64(codes + v * 64);
      __m512i values[4];  // float32, whose lower halves are 0
      for (int i = 0; i < 4; ++i)
        values[i] =
            _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * i), 24)));
      for (int i = 0; i < 2; ++i)
        store64(to + 64 * i, _mm512_or_si512(_mm512_srli_epi32(values[2 * i], 16), values[2 * i + 1]));
    }
  } else {
    // A permutation reads the lowest 5 bits of an index: code - zero + 16.
    uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i - 16);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      table[i] = static_cast<uint16_t>(bits >> 16);
    }
    const __m512i values = _mm512_loadu_si512(table);
    const __m512i less = minus(spread16(zeros), _mm512_set1_epi8(16));
    const __m512i first = _mm512_set1_epi32(static_cast<int>(0xff01ff00)),
                  last = _mm512_set1_epi32(static_cast<int>(0xff03ff02));
    const __m512i lane = _mm512_broadcast_i32x4(_mm_set_epi32(0x000c000c, 0x00080008, 0x00040004, 0));
    const __m512i orders[2] = {_mm512_add_epi8(first, lane), _mm512_add_epi8(last, lane)};
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512i packed = load64(codes + v * 64);
#pragma GCC unroll 4
      for (int part = 0; part < 8 / B; ++part, to += 128) {
        const __m512i index = minus(unpack<B>(packed, part), less);
        for (int i = 0; i < 2; ++i)
          store64(to + 64 * i, _mm512_permutexvar_epi16(_mm512_shuffle_epi8(index, orders[i]), values));
      }
    }
  }
}

// sums [2 side][2 side] = the products of 32 rows of x, `pitch` bytes apart, with 32 channels, whose tiles lie
// channel_pitch bytes apart; over `tiles` tiles of K.
inline void multiply_halves(const uint8_t* x, int64_t pitch, const uint8_t* weights, int64_t channel_pitch,
                            int64_t tiles, float* sums) {
  alignas(64) static constexpr float nothing[side] = {};
  load_tile<0>(nothing, 0), load_tile<1>(nothing, 0), load_tile<2>(nothing, 0), load_tile<3>(nothing, 0);
  for (int64_t k = 0; k < tiles; ++k) {
    load_tile<4>(x + 64 * k, pitch);
    load_tile<6>(weights + tile_bytes * k, 64);
    products_of_halves<0, 4, 6>();
    load_tile<7>(weights + channel_pitch + tile_bytes * k, 64);
    products_of_halves<1, 4, 7>();
    load_tile<5>(x + side * pitch + 64 * k, pitch);
    products_of_halves<2, 5, 6>();
    products_of_halves<3, 5, 7>();
  }
  constexpr int64_t row = 2 * side * sizeof(float);
  store_tile<0>(sums, row), store_tile<1>(sums + side, row);
  store_tile<2>(sums + 2 * side * side, row), store_tile<3>(sums + 2 * side * side + side, row);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
