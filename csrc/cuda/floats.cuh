// Tensors of float32, float16 or bfloat16, of which kernels see float32.
#pragma once
#include "core/halves.h"
#include "cuda/launch.cuh"

namespace qk::cuda {

template <class T>
constexpr int together = 16 / sizeof(T);  // values of an access

template <int n, class T>
__device__ Values<float, n> load_floats(const T* p) {
  const auto found = load<n>(p);
  Values<float, n> floats;
#pragma unroll
  for (int i = 0; i < n; ++i) floats.v[i] = widened(found.v[i]);
  return floats;
}

template <class T, int n>
__device__ void store_floats(T* p, const Values<float, n>& floats) {
  Values<T, n> values;
#pragma unroll
  for (int i = 0; i < n; ++i) narrow(floats.v[i], &values.v[i]);
  store(p, values);
}

}  // namespace qk::cuda
