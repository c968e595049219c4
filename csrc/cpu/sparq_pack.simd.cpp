#include "ops/sparq_pack.h"

#include "core/layout.h"
#include "core/sparq_block.h"
#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t most_halves = 64;  // of blocks, at a time: many vectors, little stack

template <class Block>
void pack_row(const SparqPackArgs& a, int64_t row) {
  const uint8_t* codes = a.codes + row * a.cols;
  uint8_t* packed = a.packed + row * a.row_bytes;
  uint64_t lost = 0;
  for (int64_t col = 0; col < a.cols; col += 8 * most_halves) {
    const int64_t values = least(8 * most_halves, a.cols - col), blocks = ceil_div(values, Block::values);
    uint64_t words[most_halves];
    typename Block::Half halves[most_halves];
    words[2 * blocks - 2] = words[2 * blocks - 1] = 0;  // what the last block is filled up with
    memcpy(words, codes + col, static_cast<size_t>(values));
    for (int64_t i = 0; i < 2 * blocks; ++i) halves[i] = Block::pack(words[i]);
    for (int64_t i = 0; i < blocks; ++i, packed += Block::bytes) {
      lost |= halves[2 * i].lost | halves[2 * i + 1].lost;
      Block::store(halves + 2 * i, packed);
    }
  }
  a.lost[row] = lost != 0;
}

}  // namespace

void sparq_pack(const SparqPackArgs& a) {
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    each_row(a.rows, a.cols, [&](int64_t row) { pack_row<decltype(block)>(a, row); });
  });
}

}  // namespace qk::cpu::QK_ISA
