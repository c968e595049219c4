#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct QuantizeArgs {
  const float* x;       // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  uint8_t* codes;       // [rows, cols]
  int64_t rows, cols;
  int bits;
};

// The common case of an NCHW tensor seen as NHWC: read as it lies, written transposed, one step and zero for all.
struct QuantizeTransposedArgs {
  const float* x;       // [images, channels, pixels]
  const float* step;    // [1]
  const int32_t* zero;  // [1]
  uint8_t* codes;       // [images, pixels, channels]
  int64_t images, channels, pixels;
  int bits;
};

}  // namespace qk

QK_KERNEL(quantize, qk::QuantizeArgs)
QK_KERNEL(quantize_transposed, qk::QuantizeTransposedArgs)
