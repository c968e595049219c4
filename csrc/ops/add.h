#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "ops/values.h"

namespace qk {

// value(a) + value(b), rounded, then the result. It may lie where an operand of its own type lies.
struct AddArgs {
  Operand a, b;  // [values]
  Result out;    // [values]
  int64_t values;
};

}  // namespace qk

QK_KERNEL(add, qk::AddArgs)
