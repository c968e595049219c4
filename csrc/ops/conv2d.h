#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "core/layout.h"
#include "ops/epilogue.h"

namespace qk {

struct Conv2dArgs {
  const uint8_t* x;       // [batch, h, w, shape.c * shape.groups]
  const uint8_t* weight;  // [layout.bytes], prepacked
  void* out;              // [batch, oh, ow, shape.n] float32, or uint8 with epilogue.out_step
  int64_t batch;          // 0 is possible
  int64_t h, w, oh, ow;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  WeightShape shape;
  PackedLayout layout;
  Epilogue epilogue;  // never per row
};

}  // namespace qk

QK_KERNEL(conv2d, qk::Conv2dArgs)
