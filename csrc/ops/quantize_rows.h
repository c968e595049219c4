#pragma once
#include <cstdint>

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

}  // namespace qk

QK_KERNEL(quantize_rows, qk::QuantizeRowsArgs)
