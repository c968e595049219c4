#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct LookupArgs {
  const uint8_t* codes;  // [values]
  const void* table;     // [256] uint8 or float32
  void* out;             // [values] of the table's type: table[code]. Bytes may lie where the codes lie.
  int64_t values;
  bool floats;
};

}  // namespace qk

QK_KERNEL(lookup, qk::LookupArgs)
