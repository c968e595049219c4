#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct SoftRoundArgs {
  const float* weight;  // [rows, cols]
  const float* v;       // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  float* out;           // [rows, cols]
  int64_t rows, cols;
  int bits;
};

struct SoftRoundBackwardArgs {
  const float* grad;    // [rows, cols]
  const float* weight;  // [rows, cols]
  const float* v;       // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  float* grad_v;        // [rows, cols]
  int64_t rows, cols;
  int bits;
  const float* penalty;  // [2], weight and exponent: that much of the gradient of rounding_penalty is added; or none is
};

}  // namespace qk

QK_KERNEL(soft_round, qk::SoftRoundArgs)
QK_KERNEL(soft_round_backward, qk::SoftRoundBackwardArgs)
