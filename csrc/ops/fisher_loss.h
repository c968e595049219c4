#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/kernel.h"

namespace qk {

struct FisherLossArgs {
  const float* output;  // [n]
  const float* target;  // [n]
  const float* weight;  // [n], or null: 1 everywhere
  float* out;           // []
  float* partial;       // [sum_chunks(n)]
  int64_t n;
  float scale;
};

struct FisherLossBackwardArgs {
  const float* grad;    // []
  const float* output;  // [n]
  const float* target;  // [n]
  const float* weight;  // [n], or null: 1 everywhere
  float* grad_output;   // [n]
  int64_t n;
  float scale;
};

}  // namespace qk

QK_KERNEL(fisher_loss, qk::FisherLossArgs)
QK_KERNEL(fisher_loss_backward, qk::FisherLossBackwardArgs)
