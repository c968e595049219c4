#include "ops/sparq_unpack.h"

#include "core/layout.h"
#include "core/sparq_block.h"
#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t most_halves = 64;  // of blocks, at a time: many vectors, little stack

template <class Block>
void unpack_row(const SparqUnpackArgs& a, int64_t row) {
  const uint8_t* packed = a.packed + row * a.row_bytes;
  uint8_t* codes = a.codes + row * a.cols;
  for (int64_t col = 0; col < a.cols; col += 8 * most_halves) {
    const int64_t values = least(8 * most_halves, a.cols - col), blocks = ceil_div(values, Block::values);
    uint64_t words[most_halves];
    typename Block::Half halves[most_halves];
    for (int64_t i = 0; i < blocks; ++i, packed += Block::bytes) Block::load(packed, halves + 2 * i);
    for (int64_t i = 0; i < 2 * blocks; ++i) words[i] = Block::unpack(halves[i]);
    memcpy(codes + col, words, static_cast<size_t>(values));
  }
}

}  // namespace

void sparq_unpack(const SparqUnpackArgs& a) {
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    each_row(a.rows, a.cols, [&](int64_t row) { unpack_row<decltype(block)>(a, row); });
  });
}

}  // namespace qk::cpu::QK_ISA
