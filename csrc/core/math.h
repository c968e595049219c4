// Powers and the soft rounding function as polynomials: one multiplication or one addition at a time, no library call
// and no fused operation, so every instruction set and CUDA give the same bits, and a loop around them vectorizes.
// Coefficients are near-minimax fits of the relative error. Terms are paired: a chain of dependent steps would leave
// the processor waiting. Tests hold the bounds of power_of (test_range_error.py) and of soft_sign (test_soft_round.py).
#pragma once
#include <cstdint>
#include <cstring>

#include "core/bits.h"

namespace qk {

QK_HD static inline float as_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

QK_HD static inline int32_t as_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// holds ? value : +0, without the branch into which a compiler would move the work of value.
QK_HD static inline float keep_if(bool holds, float value) {
  return as_float(as_bits(value) & -static_cast<int32_t>(holds));
}

// NaN stays NaN: a diverged optimization must show.
QK_HD static inline float limit(float t, float low, float high) {
  t = t < low ? low : t;
  return t > high ? high : t;
}

// 2^y within 2 ulp; 0 below y = -126, infinity from 128 on. 0 for NaN.
QK_HD static inline float exp2_of(float y) {
  y = y > -127.0f ? y : -127.0f;
  y = y < 128.0f ? y : 128.0f;
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits, its lowest bits are round(y)
  const float shifted = y + shift, f = y - (shifted - shift);
  const float f2 = f * f;
  const float high = (0.000153375775f * f2 + (0.00133998599f * f + 0.00961851981f)) * f2;
  const float p = (high + (0.0555032901f * f + 0.240226462f)) * f2 + (0.693147182f * f + 1.0f);
  const int32_t exponent = as_bits(shifted) - as_bits(shift) + 127;
  return p * as_float(exponent << 23);
}

// log2(a) for a normal positive a, within 3 ulp where a is in [0.7, 1.4], else within 2^-23 |log2(a)| + 2^-23.
QK_HD static inline float log2_of(float a) {
  constexpr int32_t root_half = 0x3f3504f3;  // sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2))
  const int32_t from = as_bits(a) - root_half;
  const float r = as_float((from & 0x7fffff) + root_half) - 1.0f;
  const float r2 = r * r, r4 = r2 * r2;
  const float low = (-0.360692114f * r + 0.480910778f) * r2 + (-0.721347511f * r + 1.44269502f);
  const float high = (-0.205705613f * r + 0.216119125f) * r2 + (-0.2391949f * r + 0.287901759f);
  const float p = (0.122805282f * r4 + high) * r4 + low;
  return p * r + static_cast<float>(from >> 23);
}

// a^power for a >= 0 and power >= 0, relative error below (4 + power |log2(a)|) 2^-23; 0 for a below 2^-126, NaN for
// NaN.
QK_HD static inline float power_of(float a, float power) {
  const float value = exp2_of(power * log2_of(a));
  return a < 1.17549435e-38f ? 0.0f : (a == a ? value : a);
}

// u(v) = 2 h(v) - 1 with h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1), AdaRound's rectified sigmoid: 1.2 tanh(v / 2)
// clamped to [-1, 1], an odd polynomial on the part that is not clamped (|v| < ln 11). Error below 5 * 2^-24.
QK_HD static inline float soft_sign(float v) {
  v = limit(v, -2.5f, 2.5f);
  const float w = v * v;
  const float w2 = w * w, w4 = w2 * w2;
  const float low = (-0.000504793425f * w + 0.0049993135f) * w2 + (-0.0499998406f * w + 0.599999964f);
  const float high = (-1.9604224e-08f * w + 3.64483611e-07f) * w2 + (-4.68354665e-06f * w + 5.025051e-05f);
  const float p = (5.14479792e-10f * w4 + high) * w4 + low;
  return limit(p * v, -1.0f, 1.0f);
}

// h(v), the part in [0, 1] that is added to floor(weight / step).
QK_HD static inline float soft_fraction(float u) { return 0.5f * u + 0.5f; }

// dh/dv = 1.2 sigmoid (1 - sigmoid) = 0.3 (1 - (u / 1.2)^2), 0 where h is clamped.
QK_HD static inline float soft_slope(float u) {
  const float slope = 0.3f - 0.208333333f * (u * u);
  return keep_if((u > -1.0f) & (u < 1.0f), slope);
}

// d/dv (1 - |u|^beta) but for the factor -2 beta: |u|^(beta - 1) sign(u) dh/dv, with slope = dh/dv = du/dv / 2.
QK_HD static inline float penalty_slope(float u, float slope, float beta) {
  const float size = as_float(as_bits(u) & 0x7fffffff);
  const float value = power_of(size, beta - 1.0f) * slope;
  return as_float((as_bits(value) & 0x7fffffff) | (as_bits(u) & static_cast<int32_t>(0x80000000)));
}

}  // namespace qk
