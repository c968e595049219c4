#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/kernel.h"

namespace qk {

struct RoundingPenaltyArgs {
  const float* v;  // [n]
  float* out;      // []
  float* partial;  // [sum_chunks(n)]
  int64_t n;
  float beta;
};

struct RoundingPenaltyBackwardArgs {
  const float* grad;  // []
  const float* v;     // [n]
  float* grad_v;      // [n]
  int64_t n;
  float beta;
};

}  // namespace qk

QK_KERNEL(rounding_penalty, qk::RoundingPenaltyArgs)
QK_KERNEL(rounding_penalty_backward, qk::RoundingPenaltyBackwardArgs)
