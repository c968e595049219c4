#pragma once
#include <cstdint>

#include "core/halves.h"
#include "core/kernel.h"

namespace qk {

enum class BagMode { sum, mean, max };
enum class RowKind { affine, codebook, shared };

// A row of bytes: `cols` codes, value i at bit i * bits, whole bytes; in front of them or behind them
//   affine: scale, offset             value = float(code) * scale + offset, product and sum rounded
//   codebook: 2^bits values           value = codebook[code]
//   shared: int32, a row of `books`   value = books[number][code]
// of type dtype. `codes_at`, `numbers_at`: where they begin, in bytes.
// sum: 0 + w[0] * value[0] + w[1] * value[1] ..., in the order of the bag, each product and sum rounded; without
// weights no product. mean: the sum divided by the count. max: the first value, then each that is larger.
// Rows of number padding_row take no part. An empty bag gives 0.
struct EmbeddingBagArgs {
  const uint8_t* rows;
  int64_t row_count, row_stride, row_bytes;  // row_stride in bytes, at least row_bytes, or any for 1 row
  int64_t cols;
  int bits;
  RowKind kind;
  FloatType dtype;
  int64_t codes_at, numbers_at;
  const float* books;  // [book_count, 2^bits]
  int64_t book_count;
  const void* indices;  // [count] int64 if wide_indices, else int32
  bool wide_indices;
  int64_t count;
  const void* offsets;  // [bags] begin of each bag, or null: bags of bag_size
  bool wide_offsets;
  int64_t bags, bag_size;
  const float* weights;  // [count] or null
  BagMode mode;
  int64_t padding_row;  // -1: none
  float* out;           // [bags, cols]
  // Written if an index, or a shared row's number, is out of range; such rows take no part. On the CPU: one of them.
  int64_t* bad;  // [1] position in indices, or null
};

}  // namespace qk

QK_KERNEL(embedding_bag, qk::EmbeddingBagArgs)
