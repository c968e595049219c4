// From an exact sum to the result: the float32 expression of docs/numerics.md, every product and sum rounded.
#pragma once
#include "cuda/rows.cuh"
#include "ops/epilogue.h"

namespace qk::cuda {

// y plus the sum over one group of K in float; groups come in order.
__device__ inline float add_group(float y, int32_t sum, float x_step, float weight_step) {
  return __fadd_rn(y, __fmul_rn(static_cast<float>(sum), __fmul_rn(x_step, weight_step)));
}

__device__ inline void finish(const Epilogue& e, float y, int64_t channel, void* out, int64_t at) {
  if (e.bias) y = __fadd_rn(y, e.bias[channel]);
  if (e.residual)
    y = __fadd_rn(y, e.residual_step
                         ? __fmul_rn(*e.residual_step,
                                     static_cast<float>(static_cast<const uint8_t*>(e.residual)[at] - *e.residual_zero))
                         : static_cast<const float*>(e.residual)[at]);
  if (e.activation != Activation::none && y < 0) y = 0;  // NaN stays, as in torch
  if (e.activation == Activation::relu6 && y > 6) y = 6;
  if (e.out_step)
    static_cast<uint8_t*>(out)[at] = code_of(y, row_of(*e.out_step, *e.out_zero, e.out_bits));
  else
    static_cast<float*>(out)[at] = y;
}

}  // namespace qk::cuda
