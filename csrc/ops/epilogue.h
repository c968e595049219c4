#pragma once
#include <cstdint>

namespace qk {

enum class Activation { none, relu, relu6 };

// From a sum to the result, for gemm and conv2d; every product and sum is rounded (docs/numerics.md):
// y = float(acc) * (x_step * weight_step[n]), groups of K added in order, + bias[n], + residual, activation; then, with
// out_step, clamp(round(y * (1 / out_step)) + out_zero, 0, 2^out_bits - 1). A residual of codes has the value
// residual_step * (code - residual_zero).
struct Epilogue {
  const float* x_step;       // [1] or [rows]
  const int32_t* x_zero;     // [1] or [rows]
  bool per_row;              // x_step and x_zero: one for each row
  int x_bits;                // codes of x, and zeros, are below 2^x_bits
  const float* weight_step;  // [n, k_groups]
  const float* bias;         // [n] or null
  Activation activation;
  const float* out_step;    // [1], or null for a float32 result
  const int32_t* out_zero;  // [1]
  int out_bits;
  const void* residual;          // of the result's shape: uint8 with residual_step, else float32; or null
  const float* residual_step;    // [1], or null
  const int32_t* residual_zero;  // [1]
};

}  // namespace qk
