#include "cuda/conv2d.cuh"

#include "cuda/epilogue.cuh"

namespace qk::cuda {
namespace {

// A thread makes one channel of one output pixel; neighbours in a warp read neighbouring channels.
__global__ void depthwise_kernel(Conv2dArgs a, int64_t all) {
  const Ending ending(a.epilogue);
  const int32_t x_zero = *a.epilogue.x_zero;
  const int64_t step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < all; i += step) {
    const int64_t n = i % a.shape.n, token = i / a.shape.n;
    const Window window = window_of(a, token, n);
    uint32_t sum = 0;
    Place tap;
    for (int64_t k = 0; k < a.shape.taps(); ++k, tap.advance(a, 1)) {
      const int64_t at = a.layout.code_at(n / PackedLayout::block, a.layout.tap_at(k), n % PackedLayout::block);
      const uint8_t* x = source_of(a, window, tap);  // padding has the code zero and adds nothing
      if (x) sum += static_cast<uint32_t>((*x - x_zero) * static_cast<int8_t>(a.weight[at]));
    }
    float y = add_group(-0.0f, static_cast<int32_t>(sum), *a.epilogue.x_step, a.epilogue.weight_step[n]);
    ending.put(a.out, i, ending.completed(y, ending.bias_of(n), i));
  }
}

}  // namespace

void conv2d(const Conv2dArgs& a) {
  if (!a.shape.depthwise()) return convolve("conv2d", a);
  const int64_t all = a.batch * a.oh * a.ow * a.shape.n;
  launch("conv2d", depthwise_kernel, ceil_div(all, block_threads), a, all);
}

}  // namespace qk::cuda
