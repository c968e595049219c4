// From an exact sum to the result: the float32 expression of docs/numerics.md, every product and sum rounded.
#pragma once
#include "cuda/rows.cuh"
#include "ops/epilogue.h"

namespace qk::cuda {

// y plus the sum over one group of K in float; groups come in order.
__device__ inline float add_group(float y, int32_t sum, float x_step, float weight_step) {
  return __fadd_rn(y, __fmul_rn(static_cast<float>(sum), __fmul_rn(x_step, weight_step)));
}

// An Epilogue whose numbers are read once: for all that a compiler knows, what is stored in the result may change them.
struct Ending {
  const Epilogue& e;
  Row out;  // with out_step
  float residual_step;
  int32_t residual_zero;

  __device__ explicit Ending(const Epilogue& epilogue) : e(epilogue), out{}, residual_step(0), residual_zero(0) {
    if (e.out_step) out = row_of(*e.out_step, *e.out_zero, e.out_bits);
    if (e.residual && e.residual_step) residual_step = *e.residual_step, residual_zero = *e.residual_zero;
  }

  __device__ float bias_of(int64_t channel) const { return e.bias ? e.bias[channel] : 0.0f; }

  // y with all that comes before its code. at: its place in the result.
  __device__ float completed(float y, float bias, int64_t at) const {
    if (e.bias) y = __fadd_rn(y, bias);
    if (e.residual)
      y = __fadd_rn(y, e.residual_step
                           ? __fmul_rn(residual_step,
                                       static_cast<float>(static_cast<const uint8_t*>(e.residual)[at] - residual_zero))
                           : static_cast<const float*>(e.residual)[at]);
    if (e.activation != Activation::none && y < 0) y = 0;  // NaN stays, as in torch
    if (e.activation == Activation::relu6 && y > 6) y = 6;
    return y;
  }

  // A completed value to its place, as its code where codes are asked for.
  __device__ void put(void* to, int64_t at, float y) const {
    if (e.out_step)
      static_cast<uint8_t*>(to)[at] = code_of(y, out);
    else
      static_cast<float*>(to)[at] = y;
  }
};

}  // namespace qk::cuda
