// Vectors of floats as wide as the instruction set has them, and the few operations that need its own names.
#pragma once
#include <cstring>

#include "cpu/simd.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: its own AVX-512 header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // such vectors never cross a call here: everything below is inlined

namespace qk::cpu::QK_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int lanes = 16;
typedef __m512 Lane;
QK_INLINE Lane all_lanes(float value) { return _mm512_set1_ps(value); }
QK_INLINE Lane lower(Lane a, Lane b) { return _mm512_min_ps(a, b); }  // a < b ? a : b, so b if one is NaN
QK_INLINE Lane higher(Lane a, Lane b) { return _mm512_max_ps(a, b); }
QK_INLINE Lane no_nan(Lane t) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, t, _CMP_ORD_Q), t); }
QK_INLINE Lane floats_of(const uint8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}
#elif defined(__AVX2__)
constexpr int lanes = 8;
typedef __m256 Lane;
QK_INLINE Lane all_lanes(float value) { return _mm256_set1_ps(value); }
QK_INLINE Lane lower(Lane a, Lane b) { return _mm256_min_ps(a, b); }
QK_INLINE Lane higher(Lane a, Lane b) { return _mm256_max_ps(a, b); }
QK_INLINE Lane no_nan(Lane t) { return _mm256_and_ps(t, _mm256_cmp_ps(t, t, _CMP_ORD_Q)); }
QK_INLINE Lane floats_of(const uint8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
#else
constexpr int lanes = 4;
typedef float Lane __attribute__((vector_size(16)));
QK_INLINE Lane all_lanes(float value) { return Lane{value, value, value, value}; }
QK_INLINE Lane lower(Lane a, Lane b) { return a < b ? a : b; }
QK_INLINE Lane higher(Lane a, Lane b) { return a > b ? a : b; }
QK_INLINE Lane no_nan(Lane t) { return t == t ? t : Lane{}; }
QK_INLINE Lane floats_of(const uint8_t* codes) {
  return Lane{static_cast<float>(codes[0]), static_cast<float>(codes[1]), static_cast<float>(codes[2]),
              static_cast<float>(codes[3])};
}
#endif

}  // namespace
}  // namespace qk::cpu::QK_ISA
