// The register tile of this instruction set, and the one for a number of rows and blocks.
#pragma once
#if defined(QK_ISA_AVX2)
#include "cpu/tile_avx2.h"
#else
#include "cpu/tile_sums.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

using Tile = void (*)(const TileArgs&);

// The tile for exactly `rows` and `blocks`, within the limits.
template <int B, bool keep, int width, int blocks, int rows>
Tile tile_of(int64_t n) {
  if constexpr (rows > 1) {
    if (n < rows) return tile_of<B, keep, width, blocks, rows - 1>(n);
  }
  return tile<B, keep, width, rows, blocks>;
}
template <int B, bool keep, int width>
Tile tile_for(int64_t rows, int64_t blocks) {
  if constexpr (most_blocks > 1) {
    if (blocks == 2) return tile_of<B, keep, width, 2, tile_limits.rows>(rows);
    if (blocks == 3) return tile_of<B, keep, width, 3, tile_limits.rows>(rows);
    if (blocks == 4) return tile_of<B, keep, width, 4, tile_limits.few_rows>(rows);
  }
  return tile_of<B, keep, width, 1, tile_limits.rows>(rows);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
