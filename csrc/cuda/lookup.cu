#include "ops/lookup.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

template <class T>
__global__ void lookup_kernel(LookupArgs a) {
  __shared__ T table[256];
  static_assert(block_threads == 256, "a thread reads an entry");
  table[threadIdx.x] = static_cast<const T*>(a.table)[threadIdx.x];
  __syncthreads();
  each_item(a.values, [&](int64_t i) { static_cast<T*>(a.out)[i] = table[a.codes[i]]; });
}

}  // namespace

void lookup(const LookupArgs& a) {
  launch("lookup", a.floats ? lookup_kernel<float> : lookup_kernel<uint8_t>, ceil_div(a.values, block_threads), a);
}

}  // namespace qk::cuda
