#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct SparqUnpackArgs {
  const uint8_t* packed;  // [rows, row_bytes]
  uint8_t* codes;         // [rows, cols]
  int64_t rows, cols, row_bytes;
  int bits, stride;
  bool pairs;
};

}  // namespace qk

QK_KERNEL(sparq_unpack, qk::SparqUnpackArgs)
