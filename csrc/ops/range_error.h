#pragma once
#include <cstdint>

#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

struct RangeErrorArgs {
  FloatType type;
  const void* x;        // [rows, cols] of type
  const float* step;    // [rows, candidates]
  const int32_t* zero;  // [rows, candidates]
  float* out;           // [rows, candidates]
  double* partial;      // [rows, range_error_chunks(cols), candidates], added up in order
  int64_t rows, cols, candidates;
  int bits;
  float power;
};

constexpr int64_t range_error_chunk = 4096;  // values of x that stay in L1 (16 KB) while every candidate reads them
constexpr int64_t range_error_chunks(int64_t cols) { return (cols + range_error_chunk - 1) / range_error_chunk; }

}  // namespace qk

QK_KERNEL(range_error, qk::RangeErrorArgs)
