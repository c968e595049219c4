// Float to code and back for the kernels of codes (docs/numerics.md).
#pragma once
#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

struct Coder {
  float inverse, low, high;
  int32_t zero;
  Coder(float step, int32_t z, int bits)
      : inverse(1.0f / step), low(static_cast<float>(-z)), high(static_cast<float>(top_code(bits) - z)), zero(z) {}
};

void to_codes(const float* __restrict x, uint8_t* __restrict codes, int64_t n, Coder c) {
  for (int64_t i = 0; i < n; ++i) {
    const float units = round_even(clamp_units(x[i] * c.inverse, c.low, c.high));
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(units) + c.zero);
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
