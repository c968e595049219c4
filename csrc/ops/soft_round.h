#pragma once
#include <cstdint>

#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

struct SoftRoundArgs {
  FloatType type;       // of the weight and v
  const void* weight;   // [rows, cols]
  const void* v;        // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  void* out;            // [rows, cols] of type
  int64_t rows, cols;
  int bits;
};

struct SoftRoundBackwardArgs {
  FloatType type;       // of the three and of grad_v
  const void* grad;     // [rows, cols]
  const void* weight;   // [rows, cols]
  const void* v;        // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  void* grad_v;         // [rows, cols]
  int64_t rows, cols;
  int bits;
  const float* penalty;  // [2], weight and exponent: that much of the gradient of rounding_penalty is added; or none is
};

}  // namespace qk

QK_KERNEL(soft_round, qk::SoftRoundArgs)
QK_KERNEL(soft_round_backward, qk::SoftRoundBackwardArgs)
