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

__device__ inline float float_at(FloatType dtype, const uint8_t* p, int i) {
  if (dtype == FloatType::float32) return float_of(word_at(p + 4 * i, 4));
  const auto half = static_cast<uint16_t>(word_at(p + 2 * i, 2));
  return dtype == FloatType::bfloat16 ? widened(BFloat{half}) : widened(Half{half});
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

// Where a bag lies among the indices. One whose offsets fall or leave them is wrong, and has none.
struct Bag {
  int64_t begin, end;
  bool wrong;

  __device__ Bag(const EmbeddingBagArgs& a, int64_t bag) : begin(bag * a.bag_size), end(begin + a.bag_size) {
    if (a.offsets) {
      begin = number_at(a.offsets, a.wide_offsets, bag);
      end = bag + 1 < a.bags ? number_at(a.offsets, a.wide_offsets, bag + 1) : a.count;
    }
    wrong = begin < 0 || end < begin || end > a.count;
    if (wrong) begin = end;
  }
};

// total with one more value, the `count`-th from 0 on.
__device__ inline float joined(const EmbeddingBagArgs& a, float total, float value, float weight, int64_t count) {
  if (a.mode == BagMode::max) return count == 0 || value > total ? value : total;
  return __fadd_rn(total, a.weights ? __fmul_rn(weight, value) : value);
}

// What leaves for a bag: NaN where it is wrong and nobody waits to be told of it.
__device__ inline float result(const EmbeddingBagArgs& a, float total, int64_t count, bool wrong) {
  if (wrong) return float_of(0x7fc00000u);
  return a.mode == BagMode::mean && count > 1 ? __fdiv_rn(total, static_cast<float>(count)) : total;
}

// A thread makes a column of a bag.
__global__ void column_kernel(EmbeddingBagArgs a) {
  each_item(a.bags * a.cols, [&](int64_t i) {
    const int64_t col = i % a.cols;
    const Bag bag(a, i / a.cols);
    bool wrong = bag.wrong;
    float total = 0;
    int64_t count = 0;
    for (int64_t at = bag.begin; at < bag.end; ++at) {
      const int64_t index = number_at(a.indices, a.wide_indices, at);
      const bool there = index >= 0 && index < a.row_count;
      if (there && index == a.padding_row) continue;
      float value = 0;
      if (!there || !read(a, a.rows + index * a.row_stride, col, &value)) {
        if (a.bad) *a.bad = at;
        wrong = true;
        continue;
      }
      total = joined(a, total, value, a.weights ? a.weights[at] : 1.0f, count++);
    }
    a.out[i] = result(a, total, count, wrong);
  });
}

constexpr int ahead = 4;  // rows on their way while as many are added up

// A lane's part of a row with a scale and an offset: one word of codes.
struct Part {
  uint32_t codes;
  float scale, offset, weight;
  bool there, takes_part;
};

__device__ inline Part part_at(const EmbeddingBagArgs& a, int64_t at, int64_t word) {
  const int64_t index = number_at(a.indices, a.wide_indices, at);
  Part part{0, 0, 0, 1, index >= 0 && index < a.row_count, false};
  part.takes_part = part.there && index != a.padding_row;
  if (!part.takes_part) return part;
  const uint8_t* row = a.rows + index * a.row_stride;
  part.codes = reinterpret_cast<const uint32_t*>(row + a.codes_at)[word];
  part.scale = float_at(a.dtype, row + a.numbers_at, 0);
  part.offset = float_at(a.dtype, row + a.numbers_at, 1);
  if (a.weights) part.weight = a.weights[at];
  return part;
}

// Rows with a scale and an offset, of whole words of codes: `lanes` neighbours make a bag, a lane the columns of a
// word, in parts where a row has more words than a warp lanes.
template <int bits>
__global__ void word_kernel(EmbeddingBagArgs a, int lanes) {
  constexpr int values = 32 / bits;
  const int64_t words = a.cols / values, parts = ceil_div(words, lanes);
  const int64_t teams = int64_t{gridDim.x} * (block_threads / lanes);
  for (int64_t job = int64_t{blockIdx.x} * (block_threads / lanes) + threadIdx.x / lanes; job < a.bags * parts;
       job += teams) {
    const int64_t word = job % parts * lanes + threadIdx.x % lanes;
    if (word >= words) continue;
    const Bag bag(a, job / parts);
    bool wrong = bag.wrong;
    float total[values] = {};
    int64_t count = 0;
    Part now[ahead], next[ahead];
    const auto read_all = [&](Part(&rows)[ahead], int64_t first) {
#pragma unroll
      for (int i = 0; i < ahead; ++i)
        if (first + i < bag.end) rows[i] = part_at(a, first + i, word);
    };
    read_all(now, bag.begin);
    for (int64_t first = bag.begin; first < bag.end; first += ahead) {
      read_all(next, first + ahead);
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (first + i >= bag.end) break;
        const Part& row = now[i];
        if (!row.there) {
          if (a.bad) *a.bad = first + i;
          wrong = true;
        }
        if (!row.takes_part) continue;
#pragma unroll
        for (int j = 0; j < values; ++j) {
          const float code = static_cast<float>(row.codes >> (j * bits) & top_code(bits));
          total[j] = joined(a, total[j], __fadd_rn(__fmul_rn(code, row.scale), row.offset), row.weight, count);
        }
        ++count;
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) now[i] = next[i];
    }
    float* out = a.out + job / parts * a.cols + word * values;
#pragma unroll
    for (int j = 0; j < values; j += 4) {
      Values<float, 4> four;
      for (int k = 0; k < 4; ++k) four.v[k] = result(a, total[j + k], count, wrong);
      store(out + j, four);
    }
  }
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a) {
  const auto whole = [](int64_t bytes) { return bytes % 4 == 0; };
  const bool words = a.kind == RowKind::affine && a.cols * a.bits % 32 == 0 && whole(a.codes_at) &&
                     (whole(a.row_stride) || a.row_count < 2) && whole(reinterpret_cast<intptr_t>(a.rows)) &&
                     reinterpret_cast<uintptr_t>(a.out) % 16 == 0;
  if (!words) return launch("embedding_bag", column_kernel, ceil_div(a.bags * a.cols, block_threads), a);
  with_bits(a.bits, [&](auto bits) {
    const int64_t count = a.cols * bits / 32;
    int lanes = 1;
    while (lanes < 32 && lanes < count) lanes *= 2;
    launch("embedding_bag", word_kernel<bits>, ceil_div(a.bags * ceil_div(count, lanes), block_threads / lanes), a,
           lanes);
  });
}

}  // namespace qk::cuda
