#include "ops/multiply.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

__global__ void multiply_kernel(MultiplyArgs a) {
  const int64_t image_values = a.pixels * a.channels;
  each_item(a.images * image_values, [&](int64_t i) {
    const float gate = value_at(a.gate, i / image_values * a.channels + i % a.channels);
    put(a.out, __fmul_rn(value_at(a.x, i), gate), i);
  });
}

}  // namespace

void multiply(const MultiplyArgs& a) {
  launch("multiply", multiply_kernel, ceil_div(a.images * a.pixels * a.channels, block_threads), a);
}

}  // namespace qk::cuda
