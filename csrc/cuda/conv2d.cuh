// A convolution of codes, and a Linear as the 1 x 1 convolution of its rows: the sums of conv2d and gemm.
#pragma once
#include "cuda/launch.cuh"
#include "ops/conv2d.h"

namespace qk::cuda {

// Launches for `op`; the weight must not be depthwise. epilogue.per_row means one x_step and x_zero for each
// image, which then is one pixel.
void convolve(const char* op, const Conv2dArgs& args);

// An output pixel's window: x[first + (row * w + col) * pixel_bytes] is its tap (row, col); row, col: of the image
// where the window starts, negative in the padding.
struct Window {
  int64_t first;
  int32_t row, col;
};

// channel: the first of x that the output reads.
__device__ inline Window window_of(const Conv2dArgs& a, int64_t token, int64_t channel) {
  return {token / (a.ow * a.oh) * a.h * a.w * (a.shape.c * a.shape.groups) + channel,
          static_cast<int32_t>(token / a.ow % a.oh * a.stride_h - a.pad_h),
          static_cast<int32_t>(token % a.ow * a.stride_w - a.pad_w)};
}

// Four codes of the padding. Where steps differ by rows there is none.
__device__ inline uint32_t padding_of(const Conv2dArgs& a) {
  return static_cast<uint32_t>(a.epilogue.per_row ? 0 : *a.epilogue.x_zero) * 0x01010101u;
}

// A place along K, that moves on without divisions: a channel of a tap.
struct Place {
  uint32_t channel = 0, row = 0, col = 0;  // row, col: of the tap in the kernel

  // Whether that is another tap. There must be channels.
  __device__ bool advance(const Conv2dArgs& a, uint32_t by) {
    const auto channels = static_cast<uint32_t>(a.shape.c), kw = static_cast<uint32_t>(a.shape.kw);
    channel += by;
    const bool another = channel >= channels;
    while (channel >= channels) {
      channel -= channels;
      if (++col == kw) col = 0, ++row;
    }
    return another;
  }
};

// Where the channels of a place's tap begin in x for a window, or null in the padding.
__device__ inline const uint8_t* pixel_of(const Conv2dArgs& a, const Window& window, const Place& place) {
  const int64_t row = window.row + place.row * a.dilation_h, col = window.col + place.col * a.dilation_w;
  if (row < 0 || row >= a.h || col < 0 || col >= a.w) return nullptr;
  return a.x + window.first + (row * a.w + col) * (a.shape.c * a.shape.groups);
}

// Where a place lies in x for a window, or null in the padding.
__device__ inline const uint8_t* source_of(const Conv2dArgs& a, const Window& window, const Place& place) {
  const uint8_t* pixel = pixel_of(a, window, place);
  return pixel ? pixel + place.channel : nullptr;
}

}  // namespace qk::cuda
