// Tensors that a kernel may take or give as float32 values or as codes.
#pragma once
#include <cstdint>

#include "ops/epilogue.h"

namespace qk {

// Codes with their step and zero: the value step * float(code - zero), one rounded product. Without: float32.
struct Operand {
  const void* data;     // uint8 with step, else float32
  const float* step;    // [1] or null
  const int32_t* zero;  // [1] with step
};

// From a float32 value y to a result: activation, then with step clamp(round(y * (1 / step)) + zero, 0, 2^bits - 1).
struct Result {
  void* data;  // uint8 with step, else float32
  Activation activation;
  const float* step;    // [1] or null
  const int32_t* zero;  // [1] with step
  int bits;             // 2 to 8
};

}  // namespace qk
