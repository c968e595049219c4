#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct SparqArgs {
  const uint8_t* codes;  // [rows, cols]
  uint8_t* out;          // [rows, cols]
  int64_t rows, cols;    // without pairs rows is 1
  int bits, stride;      // 4 with 1, 2 or 4; 3 or 2 with 1
  bool round, pairs;
  const int32_t* zero;  // one code, or nullptr for 0
};

}  // namespace qk

QK_KERNEL(sparq, qk::SparqArgs)
