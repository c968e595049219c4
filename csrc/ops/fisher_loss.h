#pragma once
#include <cstdint>

#include "core/chunks.h"
#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

struct FisherLossArgs {
  FloatType type;      // of the three
  const void* output;  // [n]
  const void* target;  // [n]
  const void* weight;  // [n], or null: 1 everywhere
  float* out;          // []
  float* slope;        // [n]
  float* partial;      // [sum_chunks(n)]
  int64_t n;
  float scale;
};

}  // namespace qk

QK_KERNEL(fisher_loss, qk::FisherLossArgs)
