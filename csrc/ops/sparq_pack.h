#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct SparqPackArgs {
  const uint8_t* codes;  // [rows, cols]
  uint8_t* packed;       // [rows, row_bytes]; every byte is written
  uint8_t* lost;         // [rows] 1 where a row has a value that no window holds, for the face to refuse; null on CUDA
  int64_t rows, cols, row_bytes;
  int bits, stride;
  bool pairs;
};

}  // namespace qk

QK_KERNEL(sparq_pack, qk::SparqPackArgs)
