#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "core/layout.h"

namespace qk {

struct PrepackArgs {
  const uint8_t* packed;  // [n, row_bytes], at rest
  const int32_t* zero;    // [n, k_groups]
  uint8_t* out;           // [layout.bytes], every byte is written
  int64_t row_bytes;
  WeightShape shape;
  PackedLayout layout;
};

}  // namespace qk

QK_KERNEL(prepack, qk::PrepackArgs)
