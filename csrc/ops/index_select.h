#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

// out[row, j] = codes[row, index[j]].
struct IndexSelectArgs {
  const uint8_t* codes;  // [rows, cols]
  const int32_t* index;  // [count]: columns; on CUDA one that is none gives 0
  uint8_t* out;          // [rows, count]
  int64_t rows, cols, count;
};

}  // namespace qk

QK_KERNEL(index_select, qk::IndexSelectArgs)
