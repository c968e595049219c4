#include "ops/sparq_pack.h"

#include "core/sparq_block.h"
#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

template <class Block>
void pack_row(const SparqPackArgs& a, int64_t row) {
  const uint8_t* codes = a.codes + row * a.cols;
  uint8_t *packed = a.packed + row * a.row_bytes, lost = 0;
  const int64_t whole = a.cols / Block::values, rest = a.cols % Block::values;
  for (int64_t i = 0; i < whole; ++i) lost |= Block::pack(codes + i * Block::values, packed + i * Block::bytes);
  if (rest) {
    uint8_t last[Block::values] = {};
    for (int64_t j = 0; j < rest; ++j) last[j] = codes[whole * Block::values + j];
    lost |= Block::pack(last, packed + whole * Block::bytes);
  }
  a.lost[row] = lost;
}

}  // namespace

void sparq_pack(const SparqPackArgs& a) {
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    each_row(a.rows, a.cols, [&](int64_t row) { pack_row<decltype(block)>(a, row); });
  });
}

}  // namespace qk::cpu::QK_ISA
