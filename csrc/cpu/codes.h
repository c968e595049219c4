// Float to code for the kernels of values (docs/numerics.md).
#pragma once
#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

// A row's step, and the limits of code - zero.
struct Row {
  float inverse, step, low, high;
  Row(float s, int32_t zero, int bits)
      : inverse(1.0f / s), step(s), low(static_cast<float>(-zero)), high(static_cast<float>(top_code(bits) - zero)) {}
};

// Ties to even, exact for |t| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Callers clamp first, which for integer
// bounds commutes with rounding.
inline float round_even(float t) { return (t + 12582912.0f) - 12582912.0f; }

// t within [low, high]; NaN gives 0, the code zero.
inline float clamp_units(float t, float low, float high) {
  t = t == t ? t : 0.0f;
  t = t > low ? t : low;
  return t < high ? t : high;
}

// The code of x, less the zero.
inline float units_of(float x, const Row& r) { return round_even(clamp_units(x * r.inverse, r.low, r.high)); }

inline void to_codes(const float* __restrict x, uint8_t* __restrict codes, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(units_of(x[i], r) - r.low));
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
