#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

// Numbers of `type` are widened to float32; what is made of them is rounded once. So in every operator of training.
struct LsqArgs {
  FloatType type;
  const void* x;        // [rows, cols] of type
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  void* out;            // [rows, cols] of type
  int64_t rows, cols;
  int bits;
};

struct LsqBackwardArgs {
  FloatType type;
  const void* grad;     // [rows, cols] of type
  const void* x;        // [rows, cols] of type
  const float* step;    // [rows]
  const int32_t* zero;  // [rows]
  void* grad_x;         // [rows, cols] of type
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
