// Sixteen values at a time, one for each channel of a block: vectors of the compiler (vector_size), which it splits to
// what the instruction set has, loads and stores of the first few, and what gcc does not do well by itself.
#pragma once
#include <cstring>

#include "cpu/dot.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // such vectors never cross a call here: everything below is inlined

namespace qk::cpu::QK_ISA {
namespace {

constexpr int block = 16;  // output channels

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Codes __attribute__((vector_size(16)));

template <class Vector, class T>
QK_INLINE Vector load(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

QK_INLINE Ints integers(const Codes& u) {
#if defined(QK_ISA_AVX2)  // gcc 12 converts them one by one
  const __m128i codes = reinterpret_cast<__m128i>(u);
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8))};
  return load<Ints>(halves);
#else
  return __builtin_convertvector(u, Ints);
#endif
}

// Of sixteen values the first `valid`, 16 or more as a rule. What is not there is loaded as 0.
#if defined(QK_ISA_AVX512VNNI)
QK_INLINE __mmask16 first_of(int64_t valid) {
  return static_cast<__mmask16>(valid >= block ? 0xffff : (1 << valid) - 1);
}
template <class Vector, class T>
QK_INLINE void store_some(T* p, const Vector& v, int64_t valid) {
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, first_of(valid), reinterpret_cast<__m512i>(v));
  else
    _mm_mask_storeu_epi8(p, first_of(valid), reinterpret_cast<__m128i>(v));
}
template <class Vector, class T>
QK_INLINE Vector load_some(const T* p, int64_t valid) {
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi32(first_of(valid), p));
  else
    return reinterpret_cast<Vector>(_mm_maskz_loadu_epi8(first_of(valid), p));
}
#elif defined(QK_ISA_AVX2)
// Half i of eight 32-bit values: all bits of the first ones.
QK_INLINE __m256i first_of(int64_t valid, int i) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(least<int64_t>(valid, block)) - 8 * i), lane);
}
template <class Vector, class T>
QK_INLINE void store_some(T* p, const Vector& v, int64_t valid) {
  if (valid >= block) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 2; ++i)
      _mm256_maskstore_epi32(reinterpret_cast<int*>(p) + 8 * i, first_of(valid, i),
                             load32(reinterpret_cast<const uint8_t*>(&v) + 32 * i));
  } else {
    uint64_t left = static_cast<uint64_t>(_mm_cvtsi128_si64(reinterpret_cast<__m128i>(v)));
    if (valid >= 8) {
      std::memcpy(p, &left, 8);
      left = static_cast<uint64_t>(_mm_extract_epi64(reinterpret_cast<__m128i>(v), 1)), p += 8, valid -= 8;
    }
    for (int size = 4; size > 0; size /= 2) {
      if (!(valid & size)) continue;
      std::memcpy(p, &left, static_cast<size_t>(size));
      p += size, left >>= 8 * size;
    }
  }
}
template <class Vector, class T>
QK_INLINE Vector load_some(const T* p, int64_t valid) {
  if (valid >= block) return load<Vector>(p);
  if constexpr (sizeof(T) == 4) {
    __m256i halves[2];
    for (int i = 0; i < 2; ++i)
      halves[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(p) + 8 * i, first_of(valid, i));
    return load<Vector>(halves);
  } else {
    T some[block] = {};
    for (int64_t i = 0; i < valid; ++i) some[i] = p[i];
    return load<Vector>(some);
  }
}
#else
template <class Vector, class T>
QK_INLINE void store_some(T* p, const Vector& v, int64_t valid) {
  if (valid >= block) {
    std::memcpy(p, &v, sizeof v);
  } else {
    T some[block];
    std::memcpy(some, &v, sizeof v);
    for (int64_t i = 0; i < valid; ++i) p[i] = some[i];
  }
}
template <class Vector, class T>
QK_INLINE Vector load_some(const T* p, int64_t valid) {
  if (valid >= block) return load<Vector>(p);
  T some[block] = {};
  for (int64_t i = 0; i < valid; ++i) some[i] = p[i];
  return load<Vector>(some);
}
#endif

// v[j] lane i becomes v[i] lane j: a round interleaves vector i with vector i + 8, four rounds rotate the 8 bits of
// (i, j) by four places.
inline void transpose(Floats* v) {
  Floats w[block];
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      w[2 * i + 1] =
          __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < block; ++i) v[i] = w[i];
  }
}

// Of sixteen channels, a row of `groups` steps each, those of the groups g .. g + 15 (or the last), a vector for each
// group. The first `valid` channels are there.
QK_INLINE void load_steps(const float* steps, int64_t groups, int64_t g, int64_t valid, Floats (&out)[block]) {
  if (groups == 1) {
    out[0] = load_some<Floats>(steps, valid);
    return;
  }
  for (int64_t i = 0; i < block; ++i)
    out[i] = i < valid ? load_some<Floats>(steps + i * groups + g, groups - g) : Floats{};
  transpose(out);
}

#if defined(QK_ISA_AVX512VNNI)
QK_INLINE Words words(Lanes v) { return reinterpret_cast<Words>(v); }
#else
QK_INLINE Words words(const Lanes& v) {
  static_assert(sizeof(Lanes) == sizeof(Words), "sixteen sums in order");
  Words w;
  std::memcpy(&w, &v, sizeof w);
  return w;
}
#endif

}  // namespace
}  // namespace qk::cpu::QK_ISA
