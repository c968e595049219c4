// From sums to results: the arithmetic of ops/epilogue.h for rows of output channels.
#pragma once
#include "cpu/simd.h"
#include "ops/epilogue.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int block = 16;  // output channels

// What the results of a call share. Without an activation the limits are infinite: a comparison less to think of.
struct Finish {
  float low, high;
  bool codes;
  float out_inverse, out_low, out_high;
  int32_t out_zero;

  explicit Finish(const Epilogue& e)
      : low(e.activation == Activation::none ? -__builtin_inff() : 0.0f),
        high(e.activation == Activation::relu6 ? 6.0f : __builtin_inff()),
        codes(e.out_step != nullptr),
        out_inverse(codes ? 1.0f / *e.out_step : 0.0f),
        out_low(codes ? -*e.out_zero : 0),
        out_high(codes ? top_code(e.out_bits) - *e.out_zero : 0),
        out_zero(codes ? *e.out_zero : 0) {}

  // y [block] with the bias still to add -> valid results at index `at` of out.
  void write(const float* __restrict y, const float* __restrict bias, void* out, int64_t at, int64_t valid) const {
    float v[block];
    for (int i = 0; i < block; ++i) {
      float t = y[i] + bias[i];
      t = t < low ? low : t;
      v[i] = t > high ? high : t;
    }
    if (!codes) {
      float* o = static_cast<float*>(out) + at;
      if (valid >= block)
        for (int i = 0; i < block; ++i) o[i] = v[i];
      else
        for (int64_t i = 0; i < valid; ++i) o[i] = v[i];
      return;
    }
    uint8_t c[block], *o = static_cast<uint8_t*>(out) + at;
    for (int i = 0; i < block; ++i)
      c[i] = static_cast<uint8_t>(static_cast<int32_t>(round_even(clamp_units(v[i] * out_inverse, out_low, out_high))) +
                                  out_zero);
    if (valid >= block)
      for (int i = 0; i < block; ++i) o[i] = c[i];
    else
      for (int64_t i = 0; i < valid; ++i) o[i] = c[i];
  }
};

// y (=, += after the first group of K) float(acc - zero * sums) * (x_step * weight_step). Sums wrap like the exact
// ones in unsigned arithmetic and are exact where the result is in int32.
template <bool first>
inline void scale(const int32_t* __restrict acc, const int32_t* __restrict sums, int32_t zero, float x_step,
                  const float* __restrict weight_step, float* __restrict y) {
  for (int i = 0; i < block; ++i) {
    const uint32_t exact = static_cast<uint32_t>(acc[i]) - static_cast<uint32_t>(zero) * static_cast<uint32_t>(sums[i]);
    const float product = static_cast<float>(static_cast<int32_t>(exact)) * (x_step * weight_step[i]);
    y[i] = first ? product : y[i] + product;
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
