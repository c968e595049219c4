// Walks a tensor seen as [rows, cols] in pieces of one row that fit in the L1 cache; short rows share a thread's call.
#pragma once
#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t piece = 4096;

// f(row, at, n): n values of `row` from offset `at` of the whole tensor.
template <class F>
void for_pieces(int64_t rows, int64_t cols, const F& f) {
  const int64_t pieces = (cols + piece - 1) / piece;
  const int64_t grain = most<int64_t>(1, grain_values / most<int64_t>(1, least(piece, cols)));
  parallel_for(rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / pieces, col = job % pieces * piece;
      f(row, row * cols + col, least(piece, cols - col));
    }
  });
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
