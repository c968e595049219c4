// float16 and bfloat16 as their 16 bits. Shifts and selects only, so that a loop around them vectorizes.
#pragma once
#include "core/math.h"

namespace qk {

enum class FloatType { float32, float16, bfloat16 };

// As they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Calls f with a value of the type.
template <class F>
static inline decltype(auto) with_float(FloatType type, F&& f) {
  switch (type) {
    case FloatType::float16: return f(Half{});
    case FloatType::bfloat16: return f(BFloat{});
    default: return f(0.0f);
  }
}

QK_HD static inline float float_of_bfloat16(uint16_t bits) { return as_float(static_cast<int32_t>(bits) << 16); }

// Denormals are the distance of a number between 2^-14 and 2^-13 from 2^-14: no float32 on the way is one, which a
// processor that is told to would take for 0.
QK_HD static inline float float_of_float16(uint16_t bits) {
  const int32_t rest = (bits & 0x7fff) << 13, sign = static_cast<int32_t>(static_cast<uint32_t>(bits & 0x8000) << 16);
  const int32_t small = as_bits(as_float(rest + (113 << 23)) - 0x1p-14f), other = rest + (112 << 23);
  const int32_t size = rest < 1 << 23 ? small : rest >= 0x0f800000 ? rest | 0x7f800000 : other;
  return as_float(size | sign);
}

// To nearest, ties to even; NaN stays NaN.
QK_HD static inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = static_cast<uint32_t>(as_bits(value));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

QK_HD static inline uint16_t float16_of(float value) {
  const uint32_t bits = static_cast<uint32_t>(as_bits(value)), size = bits & 0x7fffffff;
  // Below 2^-14 the sum with 1/2, whose unit is that of float16's denormals, rounds.
  const uint32_t small = static_cast<uint32_t>(as_bits(as_float(static_cast<int32_t>(size)) + 0.5f)) - 0x3f000000;
  const uint32_t normal = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  uint32_t half = size < 0x38800000 ? small : normal;
  half = size >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more
  half = size > 0x7f800000 ? 0x7e00 : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

QK_HD static inline float widened(float value) { return value; }
QK_HD static inline float widened(BFloat value) { return float_of_bfloat16(value.bits); }
QK_HD static inline float widened(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return float_of_float16(value.bits);
#endif
}

QK_HD static inline void narrow(float value, float* to) { *to = value; }
QK_HD static inline void narrow(float value, BFloat* to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  to->bits = bfloat16_of(value);
#endif
}
QK_HD static inline void narrow(float value, Half* to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  to->bits = float16_of(value);
#endif
}

}  // namespace qk
