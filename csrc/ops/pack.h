#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct PackArgs {
  const uint8_t* codes;  // [rows, cols]
  uint8_t* packed;       // [rows, row_bytes]; every byte is written, the padding with 0
  uint8_t* used;         // [rows] OR of the row's codes, for the face to refuse those that do not fit; null on CUDA
  int64_t rows, cols, row_bytes;
  int bits;  // 2, 4 or 8
};

}  // namespace qk

QK_KERNEL(pack, qk::PackArgs)
