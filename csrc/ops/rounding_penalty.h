#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

struct RoundingPenaltyArgs {
  FloatType type;
  const void* v;   // [n] of type
  float* out;      // []
  float* partial;  // [sum_chunks(n)]
  int64_t n;
  float beta;
};

struct RoundingPenaltyBackwardArgs {
  const float* grad;  // []
  FloatType type;
  const void* v;  // [n] of type
  void* grad_v;   // [n] of type
  int64_t n;
  float beta;
};

}  // namespace qk

QK_KERNEL(rounding_penalty, qk::RoundingPenaltyArgs)
QK_KERNEL(rounding_penalty_backward, qk::RoundingPenaltyBackwardArgs)
