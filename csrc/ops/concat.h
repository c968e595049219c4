#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct ConcatPart {
  const uint8_t* codes;  // [pixels, channels]
  int64_t channels;
  const float* step;    // [1]
  const int32_t* zero;  // [1]
};

// Each part's values, step * float(code - zero), quantized: clamp(round(value * (1 / out_step)) + out_zero, 0, top).
struct ConcatArgs {
  const ConcatPart* parts;  // on the host
  int64_t count;
  uint8_t* out;  // [pixels, channels]: the parts side by side
  int64_t pixels, channels;
  const float* out_step;    // [1]
  const int32_t* out_zero;  // [1]
  int out_bits;
};

}  // namespace qk

QK_KERNEL(concat, qk::ConcatArgs)
