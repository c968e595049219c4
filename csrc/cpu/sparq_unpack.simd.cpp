#include "ops/sparq_unpack.h"

#include "core/sparq_block.h"
#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

template <class Block>
void unpack_row(const SparqUnpackArgs& a, int64_t row) {
  const uint8_t* packed = a.packed + row * a.row_bytes;
  uint8_t* codes = a.codes + row * a.cols;
  const int64_t whole = a.cols / Block::values, rest = a.cols % Block::values;
  for (int64_t i = 0; i < whole; ++i) Block::unpack(packed + i * Block::bytes, codes + i * Block::values);
  if (rest) {
    uint8_t last[Block::values];
    Block::unpack(packed + whole * Block::bytes, last);
    for (int64_t j = 0; j < rest; ++j) codes[whole * Block::values + j] = last[j];
  }
}

}  // namespace

void sparq_unpack(const SparqUnpackArgs& a) {
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    each_row(a.rows, a.cols, [&](int64_t row) { unpack_row<decltype(block)>(a, row); });
  });
}

}  // namespace qk::cpu::QK_ISA
