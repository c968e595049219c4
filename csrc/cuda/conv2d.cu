#include "cuda/conv2d.cuh"

#include "cuda/dot.cuh"
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

// A thread makes four channels of one output pixel, of four rows of a column of the window at a time, whose weights lie
// together. x and the result must start at a multiple of four channels.
__global__ void depthwise_four_kernel(Conv2dArgs a, int64_t all) {
  const Ending ending(a.epilogue);
  const float x_step = *a.epilogue.x_step;
  const auto x_zero = static_cast<uint32_t>(*a.epilogue.x_zero);
  const uint32_t padding = padding_of(a);
  const auto* sums = reinterpret_cast<const int32_t*>(a.weight + a.layout.sums_at);
  const int64_t step = int64_t{gridDim.x} * block_threads, of_pixel = a.shape.n / 4;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < all; i += step) {
    const int64_t n = i % of_pixel * 4, token = i / of_pixel;
    const Window window = window_of(a, token, n);
    int32_t dot[4] = {};
    const uint8_t* next = a.weight + a.layout.code_at(n / PackedLayout::block, 0, n % PackedLayout::block);
    for (uint32_t col = 0; col < a.shape.kw; ++col)
      for (uint32_t row = 0; row < a.shape.kh; row += 4, next += PackedLayout::vector) {
        uint32_t x[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          // Past the window weights are 0.
          const uint8_t* from = row + j < a.shape.kh ? source_of(a, window, {0, row + j, col}) : nullptr;
          x[j] = from ? *reinterpret_cast<const uint32_t*>(from) : padding;
        }
        transpose(x);
        const auto weights = load<4>(reinterpret_cast<const uint32_t*>(next));
#pragma unroll
        for (int j = 0; j < 4; ++j) dot[j] = dot4(x[j], weights.v[j], dot[j]);
      }
    Values<float, 4> y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto weight_sum = static_cast<uint32_t>(sums[n + j]);
      const auto sum = static_cast<int32_t>(static_cast<uint32_t>(dot[j]) - x_zero * weight_sum);
      y.v[j] = ending.completed(add_group(-0.0f, sum, x_step, a.epilogue.weight_step[n + j]), ending.bias_of(n + j),
                                4 * i + j);
    }
    if (!a.epilogue.out_step) {
      store(static_cast<float*>(a.out) + 4 * i, y);
      continue;
    }
    Values<uint8_t, 4> codes;
#pragma unroll
    for (int j = 0; j < 4; ++j) codes.v[j] = code_of(y.v[j], ending.out);
    store(static_cast<uint8_t*>(a.out) + 4 * i, codes);
  }
}

}  // namespace

void conv2d(const Conv2dArgs& a) {
  if (!a.shape.depthwise()) return convolve("conv2d", a);
  const int64_t all = a.batch * a.oh * a.ow * a.shape.n;
  check_aligned("conv2d", "weight", a.weight, 16);
  if (a.shape.n % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 4 == 0)
    return launch("conv2d", depthwise_four_kernel, ceil_div(all / 4, block_threads), a, all / 4);
  launch("conv2d", depthwise_kernel, ceil_div(all, block_threads), a, all);
}

}  // namespace qk::cuda
