#include "ops/embedding_bag.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

__device__ inline int64_t number_at(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

__device__ inline float float_of(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// Byte by byte: a row begins anywhere.
__device__ inline uint32_t word_at(const uint8_t* p, int bytes) {
  uint32_t word = 0;
  for (int i = 0; i < bytes; ++i) word |= static_cast<uint32_t>(p[i]) << (8 * i);
  return word;
}

// The product brings the exponent's bias from 15 to 127, for denormals too.
__device__ inline float float_at(RowDtype dtype, const uint8_t* p, int i) {
  if (dtype == RowDtype::float32) return float_of(word_at(p + 4 * i, 4));
  const uint32_t half = word_at(p + 2 * i, 2);
  if (dtype == RowDtype::bfloat16) return float_of(half << 16);
  const uint32_t rest = (half & 0x7fff) << 13;
  uint32_t word;
  const float scaled = __fmul_rn(float_of(rest), 0x1p112f);
  memcpy(&word, &scaled, 4);
  return float_of(word | (half & 0x8000) << 16 | (rest >= 0x0f800000 ? 0x7f800000u : 0u));
}

// What column `col` of a row stands for. False for a book that there is not.
__device__ inline bool read(const EmbeddingBagArgs& a, const uint8_t* row, int64_t col, float* value) {
  const int per_byte = 8 / a.bits;
  const int code = row[a.codes_at + col / per_byte] >> (col % per_byte * a.bits) & top_code(a.bits);
  const uint8_t* numbers = row + a.numbers_at;
  if (a.kind == RowKind::affine) {
    const float scale = float_at(a.dtype, numbers, 0), offset = float_at(a.dtype, numbers, 1);
    *value = __fadd_rn(__fmul_rn(static_cast<float>(code), scale), offset);
  } else if (a.kind == RowKind::codebook) {
    *value = float_at(a.dtype, numbers, code);
  } else {
    const int64_t book = static_cast<int32_t>(word_at(numbers, 4));
    if (book < 0 || book >= a.book_count) return false;
    *value = a.books[(book << a.bits) + code];
  }
  return true;
}

// A thread makes a column of a bag. One whose offsets fall or leave the indices, or that names no row, is NaN where
// nobody waits to be told of it.
__global__ void embedding_bag_kernel(EmbeddingBagArgs a) {
  each_item(a.bags * a.cols, [&](int64_t i) {
    const int64_t bag = i / a.cols, col = i % a.cols;
    int64_t begin = bag * a.bag_size, end = begin + a.bag_size;
    if (a.offsets) {
      begin = number_at(a.offsets, a.wide_offsets, bag);
      end = bag + 1 < a.bags ? number_at(a.offsets, a.wide_offsets, bag + 1) : a.count;
    }
    bool wrong = begin < 0 || end < begin || end > a.count;
    if (wrong) begin = end;
    float total = 0;
    int64_t count = 0;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t index = number_at(a.indices, a.wide_indices, at);
      const bool there = index >= 0 && index < a.row_count;
      if (there && index == a.padding_row) continue;
      float value = 0;
      if (!there || !read(a, a.rows + index * a.row_stride, col, &value)) {
        if (a.bad) *a.bad = at;
        wrong = true;
        continue;
      }
      if (a.mode == BagMode::max) {
        total = count == 0 || value > total ? value : total;
      } else {
        total = __fadd_rn(total, a.weights ? __fmul_rn(a.weights[at], value) : value);
      }
      ++count;
    }
    if (a.mode == BagMode::mean && count > 1) total = __fdiv_rn(total, static_cast<float>(count));
    a.out[i] = wrong ? float_of(0x7fc00000u) : total;
  });
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a) {
  launch("embedding_bag", embedding_bag_kernel, ceil_div(a.bags * a.cols, block_threads), a);
}

}  // namespace qk::cuda
