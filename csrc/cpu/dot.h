// Sixteen sums of products, one for each output channel of a block: the only header with intrinsics of the integer
// operators. A vector of weights is 64 bytes, channel i at bytes 4 i .. 4 i + 3 (core/layout.h).
#pragma once
#include <cstring>

#include "core/cut.h"
#include "cpu/simd.h"
#if !defined(QK_ISA_GENERIC)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: its own AVX-512 header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace qk::cpu::QK_ISA {
namespace {

QK_INLINE uint32_t load4(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if defined(QK_ISA_AVX512VNNI)

using Bytes = __m512i;
using Lanes = __m512i;
using Four = __m512i;  // four codes of x, seen by every channel

// 9 x 3 sums, 3 weights and 1 x of the 32 registers.
constexpr TileLimits tile_limits{9, 3, 6, 4};
constexpr int most_blocks = 4, probe_sums = 28;
constexpr bool width_matters = false, words_of_8_bits = false;

QK_INLINE Bytes load64(const uint8_t* p) { return _mm512_loadu_si512(p); }
QK_INLINE void store64(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
// The zeros of 16 channels, each four times.
QK_INLINE Bytes spread16(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
}
template <int B>
QK_INLINE Bytes unpack(Bytes v, int part) {
  return _mm512_and_si512(_mm512_srli_epi16(v, part * B), _mm512_set1_epi8((1 << B) - 1));
}
// The same times 2^(part * B), as unsigned bytes: without a shift.
template <int B>
QK_INLINE Bytes unpack_high(Bytes v, int part) {
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(((1 << B) - 1) << (part * B))));
}
QK_INLINE Bytes minus(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
// The first n of each channel's four bytes, 1 to 3, and 0.
QK_INLINE Bytes first_bytes(Bytes v, int n) { return _mm512_and_si512(v, _mm512_set1_epi32((1 << 8 * n) - 1)); }
QK_INLINE Lanes none() { return _mm512_setzero_si512(); }
QK_INLINE Lanes sum(Lanes a, Lanes b) { return _mm512_add_epi32(a, b); }
QK_INLINE Four broadcast4(const uint8_t* p) { return _mm512_set1_epi32(static_cast<int>(load4(p))); }
template <bool small>
QK_INLINE Lanes dot4(Lanes acc, Four x, Bytes w) {
  return _mm512_dpbusd_epi32(acc, x, w);
}
// Signed x, unsigned weights.
QK_INLINE Lanes dot4_moved(Lanes acc, Four x, Bytes w) { return _mm512_dpbusd_epi32(acc, w, x); }
QK_INLINE Lanes shifted(Lanes v, int bits) { return _mm512_srai_epi32(v, bits); }
QK_INLINE void store(int32_t* p, Lanes v) { _mm512_storeu_si512(p, v); }
inline uint32_t sum_codes(const uint8_t* x, int64_t n) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i a = none(), b = none();
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    a = _mm512_dpbusd_epi32(a, load64(x + i), ones);
    b = _mm512_dpbusd_epi32(b, load64(x + i + 64), ones);
  }
  for (; i < n; i += 64) {
    const __mmask64 there = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    a = _mm512_dpbusd_epi32(a, _mm512_maskz_loadu_epi8(there, x + i), ones);
  }
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(a, b)));
}

#elif defined(QK_ISA_AVX2)

struct Bytes {
  __m256i a, b;
};
struct Lanes {
  __m256i a, b;
};
using Four = __m256i;

// 6 x 1: two vectors of sums for each row, two of weights, two for the products.
constexpr TileLimits tile_limits{6, 1, 6, 1};
constexpr int most_blocks = 1, probe_sums = 4;
constexpr bool width_matters = true, words_of_8_bits = true;

QK_INLINE __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
QK_INLINE Bytes load64(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
QK_INLINE void store64(uint8_t* p, Bytes v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
}
QK_INLINE Bytes spread16(const uint8_t* p) {
  const __m256i four = _mm256_set1_epi32(0x01010101);
  const auto half = [&](const uint8_t* q) {
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))), four);
  };
  return {half(p), half(p + 8)};
}
template <int B>
QK_INLINE Bytes unpack(Bytes v, int part) {
  const __m256i mask = _mm256_set1_epi8((1 << B) - 1);
  return {_mm256_and_si256(_mm256_srli_epi16(v.a, part * B), mask),
          _mm256_and_si256(_mm256_srli_epi16(v.b, part * B), mask)};
}
QK_INLINE Bytes first_bytes(Bytes v, int n) {
  const __m256i mask = _mm256_set1_epi32((1 << 8 * n) - 1);
  return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
QK_INLINE Bytes minus(Bytes a, Bytes b) { return {_mm256_sub_epi8(a.a, b.a), _mm256_sub_epi8(a.b, b.b)}; }
QK_INLINE Lanes none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
QK_INLINE Lanes sum(Lanes a, Lanes b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
QK_INLINE Four broadcast4(const uint8_t* p) { return _mm256_set1_epi32(static_cast<int>(load4(p))); }
// A sum stays one chain of additions: gcc would reorder them, keep every product of a loop and spill most.
QK_INLINE __m256i in_order(__m256i v) {
  asm("" : "+x"(v));
  return v;
}
// small: |weight| <= 64, so two products fit into 16 bits (2 * 255 * 64 < 2^15) and maddubs is exact. Otherwise it
// would saturate: even and odd bytes are widened first.
template <bool small>
QK_INLINE __m256i dot4(__m256i acc, __m256i x, __m256i w) {
  if constexpr (small) {
    return in_order(_mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1))));
  } else {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x00ff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return in_order(_mm256_add_epi32(acc, _mm256_add_epi32(even, odd)));
  }
}
// Of a vector of int8 weights, half 0 or 1 of the four codes of each channel as 16-bit words: the two bytes
// go to the upper halves of words, and down again with their sign.
QK_INLINE Bytes words_of_half(const uint8_t* w, int half) {
  const char c = static_cast<char>(2 * half), d = static_cast<char>(c + 1), no = -128;
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(no, c, no, d, no, c + 4, no, d + 4, no, c + 8, no, d + 8, no, c + 12, no, d + 12));
  return {_mm256_srai_epi16(_mm256_shuffle_epi8(load32(w), order), 8),
          _mm256_srai_epi16(_mm256_shuffle_epi8(load32(w + 32), order), 8)};
}
template <bool small>
QK_INLINE Lanes dot4(Lanes acc, Four x, Bytes w) {
  return {dot4<small>(acc.a, x, w.a), dot4<small>(acc.b, x, w.b)};
}
QK_INLINE void store(int32_t* p, Lanes v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.b);
}
inline uint32_t sum_codes(const uint8_t* x, int64_t n) {
  const __m256i nothing = _mm256_setzero_si256();
  __m256i sums = nothing;  // four of 64 bits
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) sums = _mm256_add_epi64(sums, _mm256_sad_epu8(load32(x + i), nothing));
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  uint32_t total = static_cast<uint32_t>(_mm_cvtsi128_si64(two)) + static_cast<uint32_t>(_mm_extract_epi64(two, 1));
  for (; i < n; ++i) total += x[i];
  return total;
}

#else

struct Bytes {
  int8_t v[64];
};
struct Lanes {
  uint32_t v[16];  // wraps, as the vectors of the others do
};
struct Four {
  int32_t v[4];
};

constexpr TileLimits tile_limits{4, 1, 4, 1};
constexpr int most_blocks = 1, probe_sums = 4;
constexpr bool width_matters = false, words_of_8_bits = false;

QK_INLINE Bytes load64(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, 64);
  return v;
}
QK_INLINE void store64(uint8_t* p, const Bytes& v) { std::memcpy(p, &v, 64); }
QK_INLINE Bytes spread16(const uint8_t* p) {
  Bytes v;
  for (int i = 0; i < 64; ++i) v.v[i] = static_cast<int8_t>(p[i / 4]);
  return v;
}
template <int B>
QK_INLINE Bytes unpack(const Bytes& v, int part) {
  Bytes out;
  for (int i = 0; i < 64; ++i)
    out.v[i] = static_cast<int8_t>((static_cast<uint8_t>(v.v[i]) >> (part * B)) & ((1 << B) - 1));
  return out;
}
QK_INLINE Bytes first_bytes(Bytes v, int n) {
  for (int i = 0; i < 64; ++i)
    if (i % 4 >= n) v.v[i] = 0;
  return v;
}
template <int B>
QK_INLINE Bytes unpack_high(const Bytes& v, int part) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<int8_t>(v.v[i] & ((1 << B) - 1) << (part * B));
  return out;
}
QK_INLINE Bytes minus(Bytes a, const Bytes& b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<int8_t>(a.v[i] - b.v[i]);
  return a;
}
QK_INLINE Lanes none() { return {}; }
QK_INLINE Lanes sum(Lanes a, const Lanes& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
QK_INLINE Four broadcast4(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
template <bool small>
QK_INLINE Lanes dot4(Lanes acc, const Four& x, const Bytes& w) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<uint32_t>(x.v[j] * w.v[4 * i + j]);
  return acc;
}
QK_INLINE Lanes dot4_moved(Lanes acc, const Four& x, const Bytes& w) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j)
      acc.v[i] += static_cast<uint32_t>(static_cast<int8_t>(x.v[j]) * static_cast<uint8_t>(w.v[4 * i + j]));
  return acc;
}
QK_INLINE Lanes shifted(Lanes v, int bits) {
  for (int i = 0; i < 16; ++i) v.v[i] = static_cast<uint32_t>(static_cast<int32_t>(v.v[i]) >> bits);
  return v;
}
QK_INLINE void store(int32_t* p, const Lanes& v) { std::memcpy(p, &v, 64); }

#endif

#if defined(QK_ISA_GENERIC)
inline uint32_t sum_codes(const uint8_t* x, int64_t n) {
  uint32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}
#endif

}  // namespace
}  // namespace qk::cpu::QK_ISA
