// How a matrix product is cut into tiles, blocks and shares of threads. A pure function: tests/ops/test_cut.py.
#pragma once
#include <cstdint>

#include "core/layout.h"

namespace qk {

// What the register tile of an instruction set takes: up to `rows` rows of x times `blocks` blocks of 16 channels; up
// to few_rows rows it takes few_blocks.
struct TileLimits {
  int64_t rows, blocks, few_rows, few_blocks;
};

// Units of work are one block of rows times one column of tiles, in the order outer, row block, column. Blocks of rows
// are block_rows long but for the last; column i of n has the blocks [i * all / n, (i + 1) * all / n).
struct Cut {
  int64_t tile_rows, tile_blocks;  // at most
  int64_t block_rows, row_blocks, columns, units, workers;
};

// A block of rows should stay in the L2 cache (1 MB and more) beside a column of weights.
constexpr int64_t rows_budget = 768 * 1024;
constexpr double work_per_thread = 1 << 19;  // products; below this a second thread costs more than it saves

// Static: each instruction set keeps its own copy. row_unit: rows that should stay together, of which a tile takes no
// more; 1 for any.
static constexpr Cut cut(int64_t rows, int64_t row_unit, const PackedLayout& p, const TileLimits& tile,
                         int64_t threads) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto most = [](int64_t a, int64_t b) { return a < b ? b : a; };
  const double work = static_cast<double>(rows) * p.outer * p.blocks_per_outer * PackedLayout::block * p.k;
  const double useful = work / work_per_thread;
  const int64_t workers = useful < threads ? most(1, static_cast<int64_t>(useful)) : threads;

  Cut c{};
  const auto shape_tiles = [&] {
    const int64_t run = row_unit > 1 ? least(row_unit, c.block_rows) : c.block_rows;
    // Four blocks: one column of flat tiles is faster than two of two blocks.
    const bool flat = p.blocks_per_outer == tile.few_blocks;
    c.tile_rows = ceil_div(run, ceil_div(run, flat ? tile.few_rows : tile.rows));
    c.tile_blocks = least(c.tile_rows <= tile.few_rows ? tile.few_blocks : tile.blocks, p.blocks_per_outer);
    c.columns = ceil_div(p.blocks_per_outer, c.tile_blocks);
  };
  const auto cut_rows = [&](int64_t blocks) {
    c.block_rows = round_up(ceil_div(rows, blocks), row_unit);
    c.row_blocks = ceil_div(rows, c.block_rows);
    shape_tiles();
  };
  // Results of a row are written column by column: where weights are few, the rows' results should stay there as well.
  const bool few_weights = p.blocks_per_outer * PackedLayout::block * p.k_padded <= rows_budget / 2;
  const int64_t row_bytes = p.k_padded + (few_weights ? p.n_per_outer : 0);
  const int64_t fit = most(row_unit > 1 ? row_unit : tile.rows, rows_budget / row_bytes);
  const int64_t row_blocks = ceil_div(rows, fit);
  cut_rows(row_blocks);
  // Several units for each thread, or one rounds up to two for some and none for others.
  constexpr int64_t units_each = 4;
  if (workers > 1 && p.outer * c.columns * c.row_blocks < units_each * workers) {
    const int64_t wanted = ceil_div(units_each * workers, p.outer * c.columns);
    const int64_t finest = ceil_div(rows, row_unit > 1 ? row_unit : tile.rows);
    cut_rows(most(row_blocks, least(wanted, finest)));
    if (p.outer * c.columns * c.row_blocks < units_each * workers) {
      const int64_t columns = ceil_div(units_each * workers, p.outer * c.row_blocks);
      c.columns = least(p.blocks_per_outer, most(c.columns, columns));
      c.tile_blocks = ceil_div(p.blocks_per_outer, c.columns);
    }
  }
  c.units = p.outer * c.row_blocks * c.columns;
  c.workers = least(workers, c.units);
  return c;
}

}  // namespace qk
