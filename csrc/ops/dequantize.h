#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct DequantizeArgs {
  const uint8_t* codes;  // [rows, cols]
  const float* step;     // [rows]
  const int32_t* zero;   // [rows]
  float* out;            // [rows, cols]: float(code - zero) * step
  int64_t rows, cols;
};

// NHWC codes seen as NCHW: read as they lie, written transposed, one step and zero for all.
struct DequantizeTransposedArgs {
  const uint8_t* codes;  // [images, pixels, channels]
  const float* step;     // [1]
  const int32_t* zero;   // [1]
  float* out;            // [images, channels, pixels]
  int64_t images, channels, pixels;
};

}  // namespace qk

QK_KERNEL(dequantize, qk::DequantizeArgs)
QK_KERNEL(dequantize_transposed, qk::DequantizeTransposedArgs)
