// Float32 values from codes and codes from values, a strip at a time (docs/numerics.md). With vectors of n floats a
// strip is 4 n values in their natural order: four vectors make one vector of codes.
#pragma once
#include <cstring>

#include "cpu/codes.h"
#include "cpu/lanes.h"
#include "ops/values.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t strip = 4 * lanes;

struct Values {
  Lane v[4];
};

#if defined(__AVX512BW__)
// 2^23 + code: the code's byte below the upper bytes of 2^23.
QK_INLINE Lane shifted_codes(const uint8_t* codes) {
  const __m512i spread =
      _mm512_set_epi64(0x0000000f0000000e, 0x0000000d0000000c, 0x0000000b0000000a, 0x0000000900000008,
                       0x0000000700000006, 0x0000000500000004, 0x0000000300000002, 0x0000000100000000);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_castsi512_ps(
      _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111, bytes, spread));
}
// rint(t) + zero, saturated to [0, 255]; a t beyond int32 gives 0, so callers clamp what may exceed it.
QK_INLINE void store_codes(const Values& t, int16_t zero, uint8_t low, uint8_t high, uint8_t* out) {
  const __m512i zeros = _mm512_set1_epi16(zero);
  const __m512i first = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[0]), _mm512_cvtps_epi32(t.v[1]));
  const __m512i second = _mm512_packs_epi32(_mm512_cvtps_epi32(t.v[2]), _mm512_cvtps_epi32(t.v[3]));
  __m512i codes = _mm512_packus_epi16(_mm512_adds_epi16(first, zeros), _mm512_adds_epi16(second, zeros));
  codes = _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), codes);
  codes = _mm512_min_epu8(_mm512_max_epu8(codes, _mm512_set1_epi8(static_cast<char>(low))),
                          _mm512_set1_epi8(static_cast<char>(high)));
  std::memcpy(out, &codes, sizeof codes);
}
#elif defined(__AVX2__)
QK_INLINE Lane shifted_codes(const uint8_t* codes) {
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  return _mm256_castsi256_ps(_mm256_or_si256(words, _mm256_set1_epi32(0x4b000000)));
}
QK_INLINE void store_codes(const Values& t, int16_t zero, uint8_t low, uint8_t high, uint8_t* out) {
  const __m256i zeros = _mm256_set1_epi16(zero);
  const __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[0]), _mm256_cvtps_epi32(t.v[1]));
  const __m256i second = _mm256_packs_epi32(_mm256_cvtps_epi32(t.v[2]), _mm256_cvtps_epi32(t.v[3]));
  __m256i codes = _mm256_packus_epi16(_mm256_adds_epi16(first, zeros), _mm256_adds_epi16(second, zeros));
  codes = _mm256_permutevar8x32_epi32(codes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  codes = _mm256_min_epu8(_mm256_max_epu8(codes, _mm256_set1_epi8(static_cast<char>(low))),
                          _mm256_set1_epi8(static_cast<char>(high)));
  std::memcpy(out, &codes, sizeof codes);
}
#else
QK_INLINE Lane shifted_codes(const uint8_t* codes) { return floats_of(codes) + 8388608.0f; }
QK_INLINE void store_codes(const Values& t, int16_t zero, uint8_t low, uint8_t high, uint8_t* out) {
  const Lane bottom = all_lanes(static_cast<float>(low - zero)), top = all_lanes(static_cast<float>(high - zero));
  for (int i = 0; i < 4; ++i) {
    const Lane units = lower(top, higher(bottom, t.v[i])) + 12582912.0f - 12582912.0f;
    for (int j = 0; j < lanes; ++j) out[i * lanes + j] = static_cast<uint8_t>(static_cast<int32_t>(units[j]) + zero);
  }
}
#endif

// A side of an operation: codes with their step, or float32.
struct Source {
  Lane offset, step;
  float largest;  // |value| of any code; infinite for float32
  explicit Source(const Operand& o)
      : offset(all_lanes(o.step ? 8388608.0f + static_cast<float>(*o.zero) : 0.0f)),
        step(all_lanes(o.step ? *o.step : 0.0f)),
        largest(o.step ? *o.step * 255.0f : __builtin_inff()) {}

  template <bool codes>
  QK_INLINE Values read(const void* data, int64_t at) const {
    Values x;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (codes)
        x.v[i] = (shifted_codes(static_cast<const uint8_t*>(data) + at + i * lanes) - offset) * step;
      else
        std::memcpy(&x.v[i], static_cast<const float*>(data) + at + i * lanes, sizeof(Lane));
    }
    return x;
  }
};

// What becomes of y. With codes, the activation is a limit of the codes: rounding is monotone.
class Sink {
 public:
  // largest: of |y| whatever the input; infinite if it may be NaN.
  Sink(const Result& r, float largest) {
    const float infinity = __builtin_inff();
    const bool relu = r.activation != Activation::none, relu6 = r.activation == Activation::relu6;
    floor_ = all_lanes(relu ? 0.0f : -infinity);
    ceiling_ = all_lanes(relu6 ? 6.0f : infinity);
    if (!r.step) return;
    const Row row(*r.step, *r.zero, r.bits);
    inverse_ = all_lanes(row.inverse);
    bottom_ = all_lanes(row.low);
    top_ = all_lanes(row.high);
    zero_ = static_cast<int16_t>(*r.zero);
    low_ = static_cast<uint8_t>(relu ? zero_ : 0);
    high_ = static_cast<uint8_t>(relu6 ? units_of(6.0f, row) - row.low : row.high - row.low);
    tame_ = largest * row.inverse < 1e9f;
  }

  // Whether no y of any input is NaN or, in steps, beyond int32.
  bool tame() const { return tame_; }

  template <bool codes, bool tame>
  QK_INLINE void write(Values y, void* out, int64_t at) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (!codes) {
        y.v[i] = lower(ceiling_, higher(floor_, y.v[i]));
        std::memcpy(static_cast<float*>(out) + at + i * lanes, &y.v[i], sizeof(Lane));
      } else {
        y.v[i] = y.v[i] * inverse_;
        if constexpr (!tame) y.v[i] = lower(top_, higher(bottom_, no_nan(y.v[i])));
      }
    }
    if constexpr (codes) store_codes(y, zero_, low_, high_, static_cast<uint8_t*>(out) + at);
  }

 private:
  Lane floor_, ceiling_, inverse_{}, bottom_{}, top_{};
  int16_t zero_ = 0;
  uint8_t low_ = 0, high_ = 255;
  bool tame_ = false;
};

// f(codes, tame) with the kind of result as compile-time constants.
template <class F>
QK_INLINE void with_result(const Result& r, const Sink& sink, const F& f) {
  if (!r.step) return f(std::false_type{}, std::false_type{});
  if (sink.tame()) return f(std::true_type{}, std::true_type{});
  f(std::true_type{}, std::false_type{});
}

template <class F>
QK_INLINE void with_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// n values of a side in a buffer of a whole strip, and back.
template <bool codes>
QK_INLINE const void* copy_in(float (&buffer)[strip], const void* data, int64_t at, int64_t n) {
  const int64_t size = codes ? 1 : 4;
  std::memset(buffer, 0, sizeof buffer);
  std::memcpy(buffer, static_cast<const char*>(data) + at * size, static_cast<size_t>(n * size));
  return buffer;
}
template <bool codes>
QK_INLINE void copy_out(const float (&buffer)[strip], void* data, int64_t at, int64_t n) {
  const int64_t size = codes ? 1 : 4;
  std::memcpy(static_cast<char*>(data) + at * size, buffer, static_cast<size_t>(n * size));
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
