#pragma once
#include <cstdint>

#include "core/bits.h"
#include "core/kernel.h"

namespace qk {

struct QuantizeRowsArgs {
  const float* x;  // [rows, cols]
  uint8_t* codes;  // [rows, cols]
  float* step;     // [rows]
  int32_t* zero;   // [rows]
  int64_t rows, cols;
  int bits;
};

// Of a row whose finite values and 0 span [low, high]. Halves, as high - low may exceed float32; at least 2^-126, so
// that the reciprocal is finite; 1 for a row without a value other than 0.
QK_HD static inline float step_of_range(float low, float high, int bits) {
  const float step = (high * 0.5f - low * 0.5f) / (0.5f * static_cast<float>(top_code(bits)));
  if (!(high > low)) return 1.0f;
  return step > 1.17549435e-38f ? step : 1.17549435e-38f;
}

// clamp(rint(-low / step), 0, top). Adding 2^23 leaves no fraction bits, ties to even; the value is at most top + 1/2.
QK_HD static inline int32_t zero_of_range(float low, float step, int bits) {
  const float top = static_cast<float>(top_code(bits)), units = -low * (1.0f / step);
  const float zero = (units + 8388608.0f) - 8388608.0f;
  return static_cast<int32_t>(zero < top ? zero : top);
}

}  // namespace qk

QK_KERNEL(quantize_rows, qk::QuantizeRowsArgs)
