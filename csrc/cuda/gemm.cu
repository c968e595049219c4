#include "ops/gemm.h"

#include "cuda/conv2d.cuh"

namespace qk::cuda {

void gemm(const GemmArgs& a) {
  Conv2dArgs rows{};  // each row is an image of one pixel
  rows.x = a.x;
  rows.weight = a.weight;
  rows.out = a.out;
  rows.batch = a.m;
  rows.h = rows.w = rows.oh = rows.ow = 1;
  rows.stride_h = rows.stride_w = rows.dilation_h = rows.dilation_w = 1;
  rows.shape = a.shape;
  rows.layout = a.layout;
  rows.epilogue = a.epilogue;
  convolve("gemm", rows);
}

}  // namespace qk::cuda
