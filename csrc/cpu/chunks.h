// The loops over values and their sums. Included by *.simd.cpp only, see simd.h.
#pragma once
#include "core/chunks.h"
#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

// body(row) for each row of `cols` values.
template <class F>
void each_row(int64_t rows, int64_t cols, const F& body) {
  parallel_for(rows, most<int64_t>(1, grain_values / most<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// body(row, at, n, job) for each chunk of each row: n values from `at`; job counts chunks, row by row.
template <class F>
void each_chunk(int64_t rows, int64_t cols, const F& body) {
  const int64_t chunks = sum_chunks(cols);
  const int64_t grain = most<int64_t>(1, grain_values / most<int64_t>(1, least(sum_chunk, cols)));  // short rows share
  parallel_for(rows * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / chunks, col = job % chunks * sum_chunk;
      body(row, row * cols + col, least(sum_chunk, cols - col), job);
    }
  });
}

// Sum of term(i) over [0, n) in an order that no instruction set changes: 16 lanes, then halves.
template <class F>
float sum_of(int64_t n, const F& term) {
  constexpr int lanes = 16;
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes; ++j) sums[j] += term(i + j);
  for (int j = 0; i + j < n; ++j) sums[j] += term(i + j);
  for (int width = lanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

inline float total(const float* partial, int64_t chunks) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk];
  return static_cast<float>(sum);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
