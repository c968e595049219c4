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

}  // namespace qk

QK_KERNEL(dequantize, qk::DequantizeArgs)
