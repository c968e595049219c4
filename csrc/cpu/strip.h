// Strips of neighbouring channels for depthwise convolutions: the second header with intrinsics, beside dot.h.
//
// A strip is one or four parts. A part is a vector of 32-bit lanes, one for each channel: four codes of four rows of
// the image while it is multiplied, then their sum. The unpack instructions work in lanes of 128 bits, so part j of a
// wide strip has channels 16 L + 4 j .. 16 L + 4 j + 3 in its 128-bit lane L; the pack instructions undo exactly that.
#pragma once
#include "cpu/dot.h"
#include "cpu/finish.h"

namespace qk::cpu::QK_ISA {
namespace {

// Weights below 8 bits have a shorter dot product (dot.h).
#if defined(QK_ISA_AVX2)
constexpr bool small_weights_help = true;
#else
constexpr bool small_weights_help = false;
#endif

#if defined(QK_ISA_AVX512VNNI)

using Part = __m512i;
using StripLimits = CodeVectors;
constexpr int part_lanes = 16, pixels_at_once = 7;

QK_INLINE Part load_part(const void* p) { return _mm512_loadu_si512(p); }
QK_INLINE void store_part(void* p, Part v) { _mm512_storeu_si512(p, v); }
template <bool small>
QK_INLINE Part dot_part(Part acc, Part x, Part w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  return acc;
}
// rint((sum * step + bias) * inverse), one operation for all pixels before the next: chains would fill the scheduler.
template <int n>
QK_INLINE void to_units(Part* v, const float* step, const float* bias, float inverse) {
  const __m512 m = _mm512_loadu_ps(step), b = _mm512_loadu_ps(bias), r = _mm512_set1_ps(inverse);
  __m512 y[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) y[i] = _mm512_cvtepi32_ps(v[i]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) y[i] = _mm512_mul_ps(y[i], m);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) y[i] = _mm512_add_ps(y[i], b);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) y[i] = _mm512_mul_ps(y[i], r);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = _mm512_cvtps_epi32(y[i]);
}

template <bool whole>
struct Wide {
  static constexpr int channels = 64, parts = 4;
  static QK_INLINE __m512i row(const uint8_t* p, __mmask64 there) {
    return whole ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(there, p);
  }
  static __mmask64 mask(int64_t valid) { return valid >= 64 ? ~__mmask64{0} : (__mmask64{1} << valid) - 1; }
  // Codes of `valid` channels in four rows -> the parts.
  static QK_INLINE void interleave(const uint8_t* r0, const uint8_t* r1, const uint8_t* r2, const uint8_t* r3,
                                   int64_t valid, uint8_t* out) {
    const __mmask64 there = mask(valid);
    const __m512i a = row(r0, there), b = row(r1, there), c = row(r2, there), d = row(r3, there);
    const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
    store_part(out, _mm512_unpacklo_epi16(ab0, cd0));
    store_part(out + 64, _mm512_unpackhi_epi16(ab0, cd0));
    store_part(out + 128, _mm512_unpacklo_epi16(ab1, cd1));
    store_part(out + 192, _mm512_unpackhi_epi16(ab1, cd1));
  }
  static QK_INLINE void store_codes(const Part* v, int, const StripLimits& l, int64_t valid, uint8_t* out, int64_t) {
    const __m512i u = narrowed(v, 4, l);
    if constexpr (whole)
      _mm512_storeu_si512(out, u);
    else
      _mm512_mask_storeu_epi8(out, mask(valid), u);
  }
};

// Sixteen channels in their own order.
template <bool whole>
struct Narrow {
  static constexpr int channels = 16, parts = 1;
  static QK_INLINE __mmask16 mask(int64_t valid) {
    return static_cast<__mmask16>(valid >= 16 ? 0xffff : (1 << valid) - 1);
  }
  static QK_INLINE __m128i row(const uint8_t* p, int64_t valid) {
    return whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(mask(valid), p);
  }
  static QK_INLINE void interleave(const uint8_t* r0, const uint8_t* r1, const uint8_t* r2, const uint8_t* r3,
                                   int64_t valid, uint8_t* out) {
    __m512i v = _mm512_castsi128_si512(row(r0, valid));
    v = _mm512_inserti32x4(v, row(r1, valid), 1);
    v = _mm512_inserti32x4(v, row(r2, valid), 2);
    v = _mm512_inserti32x4(v, row(r3, valid), 3);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    store_part(out, _mm512_shuffle_epi8(transposed(v), bytes));
  }
  // Up to four pixels, `pitch` bytes apart.
  static QK_INLINE void store_codes(const Part* v, int pixels, const StripLimits& l, int64_t valid, uint8_t* out,
                                    int64_t pitch) {
    const __m512i u = transposed(narrowed(v, pixels, l));
    const auto put = [&](uint8_t* to, __m128i codes) {
      if constexpr (whole)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
      else
        _mm_mask_storeu_epi8(to, mask(valid), codes);
    };
    put(out, _mm512_castsi512_si128(u));
    if (pixels > 1) put(out + pitch, _mm512_extracti32x4_epi32(u, 1));
    if (pixels > 2) put(out + 2 * pitch, _mm512_extracti32x4_epi32(u, 2));
    if (pixels > 3) put(out + 3 * pitch, _mm512_extracti32x4_epi32(u, 3));
  }
};

#elif defined(QK_ISA_AVX2)

using Part = __m256i;
using StripLimits = CodeLimits;
constexpr int part_lanes = 8, pixels_at_once = 3;

QK_INLINE Part load_part(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
QK_INLINE void store_part(void* p, Part v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
template <bool small>
QK_INLINE Part dot_part(Part acc, Part x, Part w) {
  return dot4<small>(acc, x, w);
}
template <int n>
QK_INLINE void to_units(Part* v, const float* step, const float* bias, float inverse) {
  const __m256 m = _mm256_loadu_ps(step), b = _mm256_loadu_ps(bias), r = _mm256_set1_ps(inverse);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(v[i]), m), b);
    v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(y, r));
  }
}

template <bool whole>
struct Wide {
  static constexpr int channels = 32, parts = 4;
  static QK_INLINE __m256i row(const uint8_t* p, int64_t valid) {
    if constexpr (whole) return load_part(p);
    if (valid % 4 == 0) {
      const __m256i lane = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(valid)), lane);
      return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), there);
    }
    uint8_t some[32] = {};
    std::memcpy(some, p, static_cast<size_t>(valid));
    return load_part(some);
  }
  static QK_INLINE void interleave(const uint8_t* r0, const uint8_t* r1, const uint8_t* r2, const uint8_t* r3,
                                   int64_t valid, uint8_t* out) {
    const __m256i a = row(r0, valid), b = row(r1, valid), c = row(r2, valid), d = row(r3, valid);
    const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
    const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
    store_part(out, _mm256_unpacklo_epi16(ab0, cd0));
    store_part(out + 32, _mm256_unpackhi_epi16(ab0, cd0));
    store_part(out + 64, _mm256_unpacklo_epi16(ab1, cd1));
    store_part(out + 96, _mm256_unpackhi_epi16(ab1, cd1));
  }
  static QK_INLINE void store_codes(const Part* v, int, const StripLimits& l, int64_t valid, uint8_t* out, int64_t) {
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(l.zero));
    const __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero);
    const __m256i b = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero);
    __m256i u = _mm256_packus_epi16(a, b);
    u = _mm256_max_epu8(u, _mm256_set1_epi8(static_cast<char>(l.low)));
    u = _mm256_min_epu8(u, _mm256_set1_epi8(static_cast<char>(l.high)));
    if constexpr (whole) {
      store_part(out, u);
    } else {
      __m128i left = _mm256_castsi256_si128(u);
      if (valid >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), left);
        left = _mm256_extracti128_si256(u, 1), out += 16, valid -= 16;
      }
      if (valid > 0) store_some(out, reinterpret_cast<Codes>(left), valid);
    }
  }
};
template <bool whole>
using Narrow = Wide<whole>;

#else

struct Part {
  uint32_t v[16];  // wraps, as the vectors of the others do
};
using StripLimits = CodeLimits;
constexpr int part_lanes = 16, pixels_at_once = 2;

QK_INLINE Part load_part(const void* p) {
  Part v;
  std::memcpy(&v, p, 64);
  return v;
}
QK_INLINE void store_part(void* p, const Part& v) { std::memcpy(p, &v, 64); }
template <bool small>
QK_INLINE Part dot_part(Part acc, const Part& x, const Part& w) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; j += 8) {
      const int32_t code = x.v[i] >> j & 0xff, weight = static_cast<int8_t>(w.v[i] >> j & 0xff);
      acc.v[i] += static_cast<uint32_t>(code * weight);
    }
  return acc;
}
template <int n>
QK_INLINE void to_units(Part* v, const float* step, const float* bias, float inverse) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 16; ++j) {
      float t = (static_cast<float>(static_cast<int32_t>(v[i].v[j])) * step[j] + bias[j]) * inverse;
      t = t < -1024.0f ? -1024.0f : t;  // beyond every code, and near enough for the sum below to round exactly
      t = t > 1024.0f ? 1024.0f : t;
      v[i].v[j] = static_cast<uint32_t>(static_cast<int32_t>((t + 12582912.0f) - 12582912.0f));
    }
}

template <bool whole>
struct Narrow {
  static constexpr int channels = 16, parts = 1;
  static QK_INLINE void interleave(const uint8_t* r0, const uint8_t* r1, const uint8_t* r2, const uint8_t* r3,
                                   int64_t valid, uint8_t* out) {
    for (int64_t i = 0; i < 16; ++i) {
      const bool there = i < valid;
      out[4 * i] = there ? r0[i] : 0;
      out[4 * i + 1] = there ? r1[i] : 0;
      out[4 * i + 2] = there ? r2[i] : 0;
      out[4 * i + 3] = there ? r3[i] : 0;
    }
  }
  static QK_INLINE void store_codes(const Part* v, int pixels, const StripLimits& l, int64_t valid, uint8_t* out,
                                    int64_t pitch) {
    for (int p = 0; p < pixels; ++p)
      for (int64_t i = 0; i < 16 && i < valid; ++i) {
        const int32_t code = static_cast<int32_t>(v[p].v[i]) + l.zero;
        out[p * pitch + i] = static_cast<uint8_t>(least(most(code, l.low), l.high));
      }
  }
};
template <bool whole>
using Wide = Narrow<whole>;

#endif

// The channel, within its strip, of a lane.
template <class Strip>
constexpr int64_t lane_channel(int64_t lane) {
  constexpr int64_t blocks = Strip::channels / 16;
  return lane / 4 % blocks * 16 + lane / 4 / blocks * 4 + lane % 4;
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
