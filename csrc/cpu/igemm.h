// The integer matrix product behind gemm and conv2d: what they state, and igemm.simd.cpp computes.
#pragma once
#include "cpu/panel.h"
#include "ops/epilogue.h"

namespace qk::cpu::QK_ISA {

// `rows` neighbouring rows of the product, stride bytes apart.
struct Run {
  const uint8_t* x;
  int64_t stride, rows;
};

// Where the rows of x come from. Functions get `self`.
struct Source {
  const void* self;
  int64_t piece_count;  // pieces of a row (tile_args.h), as many for each group of K, in order
  int64_t row_bytes;    // working memory of fill for each row; 0 if rows are read in place
  int64_t fixed_bytes;  // and beside that
  int64_t row_unit;     // blocks of rows begin at multiples of it, where they can: the pixels of an image's row, or 1
  void (*pieces)(const void* self, Piece* pieces);
  // Rows [first, first + count) of group `outer` of a convolution; returns the number of runs, at most count.
  int64_t (*fill)(const void* self, uint8_t* memory, int64_t outer, int64_t first, int64_t count, Run* runs);
};

struct Product {
  const uint8_t* weight;  // prepacked
  PackedLayout layout;
  Epilogue epilogue;
  int64_t rows, n;
  void* out;  // [rows, n]
  Source source;
};

void multiply(const Product& p);

}  // namespace qk::cpu::QK_ISA
