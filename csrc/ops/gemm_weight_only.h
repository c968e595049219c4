#pragma once
#include <cstdint>

#include "core/halves.h"
#include "core/kernel.h"
#include "core/layout.h"

namespace qk {

// y[m, n] = sum over groups of K, in order, of weight_step[n, g] * (sum over the group of x * (code - zero)), +
// bias[n]. code - zero is exact in every float type; sums are float32, and y is rounded to the type of x.
struct GemmWeightOnlyArgs {
  const void* x;          // [m, k] of type
  const uint8_t* weight;  // [layout.bytes], prepacked
  void* out;              // [m, n] of type
  FloatType type;
  int64_t m;          // 0 is possible
  WeightShape shape;  // [n, 1, 1, k]
  PackedLayout layout;
  const float* weight_step;  // [n, k_groups]
  const float* bias;         // [n] or null
};

}  // namespace qk

QK_KERNEL(gemm_weight_only, qk::GemmWeightOnlyArgs)
