#include "ops/embedding_bag.h"

#include <cstring>

#include "cpu/rows.h"

namespace qk::cpu::QK_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512BW__)
constexpr bool only_avx2 = true;
#else
constexpr bool only_avx2 = false;
#endif

// A row is fetched `ahead` lookups before its turn, its lines between the sums of the row whose turn it is: lines that
// are asked for all at once wait for each other's page.
// AVX2: at least so many ahead and `together` rows together. AMD's Zen holds back what comes after a fetch until it
// knows the page's address: so the pages of several rows are looked up at the same time. More rows than these have more
// lines than L1 waits for.
constexpr int64_t ahead = 16, together = 6;

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

// Where a row of any index would be: numbers, as a prefetch never faults.
QK_INLINE uintptr_t address(const uint8_t* rows, int64_t row_stride, int64_t index) {
  return reinterpret_cast<uintptr_t>(rows) + static_cast<uint64_t>(index) * static_cast<uint64_t>(row_stride);
}
QK_INLINE void fetch(uintptr_t line) { __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 3); }
QK_INLINE void fetch_second(uintptr_t row, int64_t row_bytes) { fetch(row + least<int64_t>(64, row_bytes - 1)); }
QK_INLINE void fetch_rest(uintptr_t row, int64_t row_bytes) {
  for (int64_t line = 128; line < row_bytes; line += 64) fetch(row + line);
}

void report(int64_t* bad, int64_t position) {
  if (bad) __atomic_store_n(bad, position, __ATOMIC_RELAXED);
}

// Columns `col` to col + accs * lanes - 1 of a bag. `last`: up to where this thread reads indices. `fetched`: up to
// where it fetched their rows, with AVX2.
template <int bits, int accs, Step step, class Numbers>
QK_INLINE void run_bag(const EmbeddingBagArgs& args, const Bag& bag, int64_t last, int64_t& fetched, int64_t col,
                       float* out) {
  typedef RowPart<bits, accs> Part;
  const EmbeddingBagArgs a = args;  // a copy stays in registers
  const int64_t row_count = a.row_count, row_stride = a.row_stride, row_bytes = a.row_bytes;
  const int64_t padding_row = a.padding_row, part_at = a.codes_at + col * bits / 8, numbers_at = a.numbers_at;
  const uint8_t *rows = a.rows, *limit = rows + (row_count - 1) * row_stride + row_bytes;
  const void* indices = a.indices;
  const bool wide = a.wide_indices;
  Lane acc[accs];
#pragma GCC unroll 16
  for (int j = 0; j < accs; ++j) acc[j] = Lane{};
  int64_t count = 0, next = fetched;
  for (int64_t i = bag.begin; i < bag.end; ++i) {
    if constexpr (only_avx2) {
      if (__builtin_expect(i + ahead >= next, 0))
        for (const int64_t end = least(next + together, last); next < end; ++next) {
          const uintptr_t row = address(rows, row_stride, number_at(indices, wide, next));
          fetch(row), fetch_second(row, row_bytes), fetch_rest(row, row_bytes);
        }
    }
    const int64_t index = number_at(indices, wide, i);
    if (__builtin_expect(static_cast<uint64_t>(index) >= static_cast<uint64_t>(row_count), 0)) {
      report(a.bad, i);
      continue;
    }
    if (index == padding_row) continue;
    const uint8_t* row = rows + index * row_stride;
    Numbers numbers;
    if (!numbers.read(a, row + numbers_at)) {
      report(a.bad, i);
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
    const Part part(codes);
    const uintptr_t later = address(rows, row_stride, number_at(indices, wide, least(i + ahead, last - 1)));
#pragma GCC unroll 16
    for (int j = 0; j < accs; ++j) {
      if constexpr (!only_avx2) {
        if (j == 0) fetch(later);
        if (j == accs / 2 - 1) fetch_second(later, row_bytes);
        if (j == accs - 1) fetch_rest(later, row_bytes);
      }
      const Lane value = part.at(numbers, j);
      if constexpr (step == Step::largest)
        acc[j] = count == 0 ? value : higher(value, acc[j]);
      else
        acc[j] = acc[j] + value;
    }
    ++count;
  }
  fetched = next;
  if (a.mode == BagMode::mean && count > 1) {
    const float divisor = static_cast<float>(count);
#pragma GCC unroll 16
    for (int j = 0; j < accs; ++j) acc[j] = acc[j] / divisor;
  }
  Part::store(acc, out + col, least<int64_t>(accs * lanes, a.cols - col));
}

template <int bits, int accs, Step step, class Numbers>
void run(const EmbeddingBagArgs& a) {
  const int64_t work = most<int64_t>(1, a.count * a.cols / most<int64_t>(1, a.bags));
  parallel_for(a.bags, most<int64_t>(1, grain_values / work), [&](int64_t begin, int64_t end) {
    const int64_t last = bag_of(a, end - 1).end;
    int64_t fetched = bag_of(a, begin).begin;
    for (int64_t b = begin; b < end; ++b) {
      const Bag bag = bag_of(a, b);
      float* out = a.out + b * a.cols;
      int64_t col = 0;
      if constexpr (only_avx2 && accs == 8)  // twice as many at a time: a few stay in L1, which costs less than a pass
        for (; col + accs * lanes < a.cols; col += 2 * accs * lanes)
          run_bag<bits, 2 * accs, step, Numbers>(a, bag, last, fetched, col, out);
      for (; col < a.cols; col += accs * lanes) run_bag<bits, accs, step, Numbers>(a, bag, last, fetched, col, out);
    }
  });
}

template <int bits, Step step, class Numbers>
void run(const EmbeddingBagArgs& a) {
  if (a.cols > 4 * lanes) return run<bits, 8, step, Numbers>(a);
  if constexpr (32 / bits <= 2 * lanes)  // else a vector has fewer lanes than a word has codes for them
    if (a.cols <= 2 * lanes) return run<bits, 2, step, Numbers>(a);
  run<bits, 4, step, Numbers>(a);
}

template <int bits, Step step>
void run(const EmbeddingBagArgs& a) {
  if constexpr (bits == 8) {
    run<bits, step, Scaled<step == Step::weighted>>(a);
  } else {
    if constexpr (only_avx2 && bits == 4)
      if (a.kind == RowKind::affine) return run<bits, step, Scaled<step == Step::weighted>>(a);
    run<bits, step, Table<bits>>(a);
  }
}

}  // namespace

void embedding_bag(const EmbeddingBagArgs& a) {
  with_bits(a.bits, [&](auto bits) {
    if (a.mode == BagMode::max) return run<bits, Step::largest>(a);
    a.weights ? run<bits, Step::weighted>(a) : run<bits, Step::plain>(a);
  });
}

}  // namespace qk::cpu::QK_ISA
