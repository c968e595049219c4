#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "ops/values.h"

namespace qk {

enum class PoolMode { max, average };

// Windows over NHWC codes. Output row i covers rows i * stride_h - pad_h + j * dilation_h, j < kernel_h, of x; what
// lies outside of x takes no part. max: the largest code of each window, with the step and zero of x. out.step is null.
// average: float(sum of code - zero) * (step / count), step / count rounded, then the result. count: `divisor` if it is
// not 0; else the window's positions inside of x, or, with count_padding, inside of x and its padding. No position: 0.
struct PoolArgs {
  Operand x;   // codes [images, h, w, channels]
  Result out;  // [images, oh, ow, channels]; uint8 for max
  PoolMode mode;
  int64_t images, h, w, channels, oh, ow;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t dilation_h, dilation_w;  // 1 for average
  bool count_padding;
  int64_t divisor;
};

}  // namespace qk

QK_KERNEL(pool, qk::PoolArgs)
