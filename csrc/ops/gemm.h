#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "core/layout.h"
#include "ops/epilogue.h"

namespace qk {

struct GemmArgs {
  const uint8_t* x;       // [m, k]
  const uint8_t* weight;  // [layout.bytes], prepacked
  void* out;              // [m, n] float32, or uint8 with epilogue.out_step
  int64_t m;              // 0 is possible
  WeightShape shape;      // [n, 1, 1, k]
  PackedLayout layout;
  Epilogue epilogue;
};

}  // namespace qk

QK_KERNEL(gemm, qk::GemmArgs)
