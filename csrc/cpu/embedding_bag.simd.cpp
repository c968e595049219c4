#include "ops/embedding_bag.h"

#include <cstring>

#include "cpu/rows.h"

namespace qk::cpu::QK_ISA {
namespace {

// Rows are fetched this many lookups ahead: further than memory answers, near enough that they are still in L1.
constexpr int64_t ahead = 16;

enum class Step { plain, weighted, largest };

int64_t number_at(const void* numbers, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(numbers)[i] : static_cast<const int32_t*>(numbers)[i];
}

// A bag: positions begin to end - 1 of indices.
struct Bag {
  int64_t begin, end;
};

Bag bag_of(const EmbeddingBagArgs& a, int64_t bag) {
  if (!a.offsets) return {bag * a.bag_size, (bag + 1) * a.bag_size};
  const int64_t begin = number_at(a.offsets, a.wide_offsets, bag);
  // With include_last_offset the last entry is the count.
  return {begin, bag + 1 < a.bags ? number_at(a.offsets, a.wide_offsets, bag + 1) : a.count};
}

QK_INLINE void fetch(const EmbeddingBagArgs& a, int64_t position) {
  const int64_t index = number_at(a.indices, a.wide_indices, position);
  const uintptr_t row = reinterpret_cast<uintptr_t>(a.rows) + static_cast<uintptr_t>(index) * a.row_stride;
  for (int64_t i = 0; i < a.row_bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(row + i));
  if (a.row_bytes % 64 > 16 || a.row_bytes % 64 == 0)
    __builtin_prefetch(reinterpret_cast<const void*>(row + a.row_bytes - 1));
}

void report(const EmbeddingBagArgs& a, int64_t position) {
  if (a.bad) __atomic_store_n(a.bad, position, __ATOMIC_RELAXED);
}

// Columns `col` to col + accs * lanes - 1 of a bag.
template <int bits, int accs, Step step>
QK_INLINE void run_bag(const EmbeddingBagArgs& a, const Bag& bag, int64_t last, int64_t col, float* out) {
  typedef RowPart<bits, accs> Part;
  const uint8_t* limit = a.rows + (a.row_count - 1) * a.row_stride + a.row_bytes;
  const int64_t part_at = a.codes_at + col * bits / 8;
  Lane acc[accs];
#pragma GCC unroll 8
  for (int j = 0; j < accs; ++j) acc[j] = Lane{};
  int64_t count = 0;
  for (int64_t i = bag.begin; i < bag.end; ++i) {
    fetch(a, i + ahead < last ? i + ahead : last - 1);
    const int64_t index = number_at(a.indices, a.wide_indices, i);
    if (__builtin_expect(static_cast<uint64_t>(index) >= static_cast<uint64_t>(a.row_count), 0)) {
      report(a, i);
      continue;
    }
    if (index == a.padding_row) continue;
    const uint8_t* row = a.rows + index * a.row_stride;
    Numbers<bits> numbers;
    if (!numbers.read(a, row + a.numbers_at)) {
      report(a, i);
      continue;
    }
    if constexpr (step == Step::weighted) numbers.weigh(a.weights[i]);
    const uint8_t* codes = row + part_at;
    alignas(64) uint8_t copy[Part::bytes];
    if (__builtin_expect(limit - codes < Part::bytes, 0)) {  // a vector would leave the table
      std::memset(copy, 0, sizeof copy);
      std::memcpy(copy, codes, static_cast<size_t>(limit - codes));
      codes = copy;
    }
    Part part(codes);
#pragma GCC unroll 8
    for (int j = 0; j < accs; ++j) {
      const Lane value = part.next(numbers, j);
      if constexpr (step == Step::largest)
        acc[j] = count == 0 ? value : larger(value, acc[j]);
      else
        acc[j] = acc[j] + value;
    }
    ++count;
  }
  alignas(64) float values[accs * lanes];
  std::memcpy(values, acc, sizeof values);
  const int64_t n = least<int64_t>(accs * lanes, a.cols - col);
  const bool mean = a.mode == BagMode::mean && count > 1;
  const float divisor = static_cast<float>(count);
  for (int64_t i = 0; i < n; ++i) {
    const float value = values[Part::place(i)];
    out[col + i] = mean ? value / divisor : value;
  }
}

template <int bits, int accs, Step step>
void run(const EmbeddingBagArgs& a) {
  const int64_t work = most<int64_t>(1, a.count * a.cols / most<int64_t>(1, a.bags));
  parallel_for(a.bags, most<int64_t>(1, grain_values / work), [&](int64_t begin, int64_t end) {
    const int64_t last = bag_of(a, end - 1).end;
    for (int64_t b = begin; b < end; ++b) {
      const Bag bag = bag_of(a, b);
      for (int64_t col = 0; col < a.cols; col += accs * lanes)
        run_bag<bits, accs, step>(a, bag, last, col, a.out + b * a.cols);
    }
  });
}

template <int bits, Step step>
void run(const EmbeddingBagArgs& a) {
  if (a.cols > 4 * lanes) return run<bits, 8, step>(a);
  if constexpr (32 / bits <= 2 * lanes)  // else a vector has fewer lanes than a word has codes for them
    if (a.cols <= 2 * lanes) return run<bits, 2, step>(a);
  run<bits, 4, step>(a);
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a) {
  with_bits(a.bits, [&](auto bits) {
    if (a.mode == BagMode::max) return run<bits, Step::largest>(a);
    a.weights ? run<bits, Step::weighted>(a) : run<bits, Step::plain>(a);
  });
}

}  // namespace qk::cpu::QK_ISA
