#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct UnpackArgs {
  const uint8_t* packed;  // [rows, row_bytes]
  uint8_t* codes;         // [rows, cols]
  int64_t rows, cols, row_bytes;
  int bits;  // 2, 4 or 8
};

}  // namespace qk

QK_KERNEL(unpack, qk::UnpackArgs)
