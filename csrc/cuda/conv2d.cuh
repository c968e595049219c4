// A convolution of codes, and a Linear as the 1 x 1 convolution of its rows: the sums of conv2d and gemm.
#pragma once
#include "ops/conv2d.h"

namespace qk::cuda {

// Launches for `op`; the weight must not be depthwise. epilogue.per_row means one x_step and x_zero for each image.
void convolve(const char* op, const Conv2dArgs& args);

}  // namespace qk::cuda
