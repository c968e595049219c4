#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "ops/values.h"

namespace qk {

// value(x) * value(gate), rounded, then the result. It may lie where x lies if it has the type of x.
struct MultiplyArgs {
  Operand x;     // [images, pixels, channels]
  Operand gate;  // [images, channels]: one for each channel of an image
  Result out;    // [images, pixels, channels]
  int64_t images, pixels, channels;
};

}  // namespace qk

QK_KERNEL(multiply, qk::MultiplyArgs)
