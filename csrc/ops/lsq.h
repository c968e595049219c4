#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/kernel.h"

namespace qk {

struct LsqArgs {
  const float* x;       // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  float* out;           // [rows, cols]
  int64_t rows, cols;
  int bits;
};

struct LsqBackwardArgs {
  const float* grad;    // [rows, cols]
  const float* x;       // [rows, cols]
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  float* grad_x;        // [rows, cols]
  float* grad_step;     // [rows]
  float* partial;       // [rows, sum_chunks(cols)] sums, added up in order so that threads never change a bit
  int64_t rows, cols;
  int bits;
  float grad_scale;
  bool inside_by_code;  // boundary "torch": inside is decided on the rounded code, not on x / step
};

}  // namespace qk

QK_KERNEL(lsq, qk::LsqArgs)
QK_KERNEL(lsq_backward, qk::LsqBackwardArgs)
