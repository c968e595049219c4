// Tensors that a kernel may take or give as float32 values or as codes (ops/values.h).
#pragma once
#include "cuda/rows.cuh"
#include "ops/values.h"

namespace qk::cuda {

__device__ inline float value_at(const Operand& o, int64_t at) {
  if (!o.step) return static_cast<const float*>(o.data)[at];
  return __fmul_rn(static_cast<float>(static_cast<const uint8_t*>(o.data)[at] - *o.zero), *o.step);
}

__device__ inline void put(const Result& r, float y, int64_t at) {
  if (r.activation != Activation::none && y < 0) y = 0;  // NaN stays, as in torch
  if (r.activation == Activation::relu6 && y > 6) y = 6;
  if (r.step)
    static_cast<uint8_t*>(r.data)[at] = code_of(y, row_of(*r.step, *r.zero, r.bits));
  else
    static_cast<float*>(r.data)[at] = y;
}

// f(i) for each i of [0, n), a thread each.
template <class F>
__device__ void each_item(int64_t n, const F& f) {
  const int64_t step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < n; i += step) f(i);
}

}  // namespace qk::cuda
