// The integer matrix product behind gemm and conv2d. Rows of x (pixels of a convolution) are packed block by block into
// panels that stay in L2; columns of tiles of the weight stream past them.
#pragma once
#include "core/scratch.h"
#include "cpu/finish.h"
#include "cpu/tile.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t panel_budget = 256 * 1024;  // of L2 (1 MB and more), beside one column of unpacked weights
constexpr double work_per_thread = 1 << 20;   // products; below this a second thread costs more than it saves

// How the work is cut: units of one block of rows x one column of tiles, in the order outer, row block, column.
struct Cut {
  int64_t block_rows, row_blocks, columns, units, workers;
};

constexpr Cut cut(int64_t rows, const PackedLayout& p, int64_t threads) {
  Cut c{};
  c.columns = ceil_div(p.blocks_per_outer, tile_blocks);
  const int64_t panels = most<int64_t>(1, panel_budget / panel_bytes(p.k_padded));
  c.block_rows = least(panels * tile_rows, round_up(rows, tile_rows));
  // Few columns: threads share the rows.
  if (p.outer * c.columns < 4 * threads)
    c.block_rows = least(c.block_rows, round_up(ceil_div(rows, 2 * threads), tile_rows));
  c.row_blocks = ceil_div(rows, c.block_rows);
  c.units = p.outer * c.row_blocks * c.columns;
  const double work = static_cast<double>(rows) * p.outer * p.blocks_per_outer * PackedLayout::block * p.k_padded;
  const double useful = least(work / work_per_thread, static_cast<double>(threads));
  c.workers = most<int64_t>(1, least(c.units, static_cast<int64_t>(useful)));
  return c;
}

struct Product {
  const uint8_t* weight;  // prepacked
  PackedLayout layout;
  Epilogue epilogue;
  int64_t rows, n;
  void* out;  // [rows, n]
};

// One worker's memory.
struct Room {
  uint8_t* panels;    // a block of rows
  uint8_t* unpacked;  // a column of tiles as int8
  float* steps;       // [k_groups][tile_blocks * 16]
};

template <int B, bool small>
class Worker {
 public:
  Worker(const Product& p, const Room& room)
      : p_(p),
        l_(p.layout),
        room_(room),
        finish_(p.epilogue),
        codes_(p.weight + l_.codes_at),
        sums_(p.weight + l_.sums_at),
        zeros_(p.weight + l_.zeros_at) {}

  // Column `column` of group `outer` against rows [first, first + count), which lie in the panels.
  void column(int64_t outer, int64_t column, int64_t first, int64_t count) {
    const int64_t in_outer = column * tile_blocks;
    const int64_t blocks = least<int64_t>(tile_blocks, l_.blocks_per_outer - in_outer);
    const int64_t at = outer * l_.blocks_per_outer + in_outer;
    const int64_t n_first = outer * l_.n_per_outer + in_outer * block;
    const int64_t n_valid = least(blocks * block, l_.n_per_outer - in_outer * block);
    load_steps(n_first, n_valid);
    TileArgs t{};
    t.weight = codes_ + at * l_.block_bytes;
    t.weight_pitch = l_.block_bytes;
    t.zeros_pitch = l_.k_groups * block;
    const bool in_registers = B < 8 && count <= tile_rows_unpacking;
    if constexpr (B < 8) {
      if (!in_registers) {
        for (int64_t b = 0; b < blocks; ++b)
          unpack_weights<B>(t.weight + b * l_.block_bytes, zeros_ + (at + b) * t.zeros_pitch, l_,
                            room_.unpacked + b * l_.k_padded * block);
        t.weight = room_.unpacked;
        t.weight_pitch = l_.k_padded * block;
      }
    }
    alignas(64) int32_t acc[tile_rows * tile_blocks * block];
    alignas(64) float y[tile_rows * tile_blocks * block];
    t.acc = acc;
    for (int64_t row = 0; row < count; row += tile_rows) {
      const int64_t rows = least<int64_t>(tile_rows, count - row);
      const Tile run = in_registers ? tile_for<B, small>(rows, blocks) : tile_for<8, small>(rows, blocks);
      // Columns follow each other in memory: the panels of this one fetch the next, a stretch each.
      t.ahead = codes_ + (at + blocks) * l_.block_bytes + row / tile_rows * (l_.k_padded * block);
      t.panel = room_.panels + row / tile_rows * panel_bytes(l_.k_padded);
      for (int64_t g = 0; g < l_.k_groups; ++g) {
        t.k_begin = g * l_.group_padded;
        t.k_end = t.k_begin + l_.group_padded;
        t.zeros = zeros_ + (at * l_.k_groups + g) * block;
        run(t);
        if (p_.epilogue.per_row)
          finish_rows<true>(first + row, rows, at, blocks, g, acc, y, n_first, n_valid);
        else
          finish_rows<false>(first + row, rows, at, blocks, g, acc, y, n_first, n_valid);
      }
    }
  }

 private:
  // Steps and bias of a column of tiles, 0 for channels that are not there. No bias is -0, which leaves every sum
  // alone.
  void load_steps(int64_t n_first, int64_t n_valid) {
    const Epilogue& e = p_.epilogue;
    for (int i = 0; i < tile_blocks * block; ++i) bias_[i] = e.bias && i < n_valid ? e.bias[n_first + i] : -0.0f;
    for (int64_t g = 0; g < l_.k_groups; ++g)
      for (int i = 0; i < tile_blocks * block; ++i)
        room_.steps[g * tile_blocks * block + i] = i < n_valid ? e.weight_step[(n_first + i) * l_.k_groups + g] : 0.0f;
  }

  // Adds the sums of group g of K to y; with the last group, writes results.
  template <bool per_row>
  void finish_rows(int64_t row, int64_t rows, int64_t at, int64_t blocks, int64_t g, const int32_t* acc, float* y,
                   int64_t n_first, int64_t n_valid) const {
    // Copies: what is written could alias the members, and every row would load them again.
    const Finish finish = finish_;
    const float* x_steps = p_.epilogue.x_step;
    const int32_t* x_zeros = p_.epilogue.x_zero;
    void* const out = p_.out;
    const int64_t n = p_.n;
    const bool first = g == 0, last = g + 1 == l_.k_groups;
    for (int64_t b = 0; b < blocks; ++b) {
      const Words sums = load<Words>(sums_ + ((at + b) * l_.k_groups + g) * sizeof(Words));
      const Floats steps = load<Floats>(room_.steps + (g * tile_blocks + b) * block);
      const Floats bias = load<Floats>(bias_ + b * block);
      const int64_t valid = n_valid - b * block;
      Words zero_sums = sums * static_cast<uint32_t>(*x_zeros);
      Floats step = steps * *x_steps;
      int64_t to = row * n + n_first + b * block;
      for (int64_t r = 0; r < rows; ++r, to += n) {
        if constexpr (per_row) {
          zero_sums = sums * static_cast<uint32_t>(x_zeros[row + r]);
          step = steps * x_steps[row + r];
        }
        const int64_t i = (r * blocks + b) * block;
        Floats value = scaled(acc + i, zero_sums, step);
        if (!first) value = load<Floats>(y + i) + value;
        if (last)
          finish.write(value + bias, out, to, valid);
        else
          std::memcpy(y + i, &value, sizeof value);
      }
    }
  }

  const Product& p_;
  const PackedLayout& l_;
  Room room_;
  Finish finish_;
  const uint8_t* codes_;
  const uint8_t* sums_;  // bytes: a view may begin anywhere
  const uint8_t* zeros_;
  float bias_[tile_blocks * block];
};

// pack(panels, outer, first, count) writes rows [first, first + count) of group `outer` with RowWriter.
template <int B, bool small, class Pack>
void multiply_stored(const Product& p, const Pack& pack) {
  const PackedLayout& l = p.layout;
  const Cut c = cut(p.rows, l, thread_count());
  const int64_t panels = round_up(c.block_rows / tile_rows * panel_bytes(l.k_padded), 4096);
  const int64_t unpacked = B < 8 ? round_up(tile_blocks * l.k_padded * block, 4096) : 0;
  const int64_t steps = l.k_groups * tile_blocks * block * 4;
  parallel_for(c.workers, 1, [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(thread_scratch(panels + unpacked + steps));
    const Room room{memory, memory + panels, reinterpret_cast<float*>(memory + panels + unpacked)};
    Worker<B, small> worker(p, room);
    int64_t packed = -1;
    for (int64_t unit = c.units * begin / c.workers; unit < c.units * end / c.workers; ++unit) {
      const int64_t rows = unit / c.columns, outer = rows / c.row_blocks;
      const int64_t first = rows % c.row_blocks * c.block_rows, count = least(c.block_rows, p.rows - first);
      if (packed != rows) pack(room.panels, outer, first, count);
      packed = rows;
      worker.column(outer, unit % c.columns, first, count);
    }
  });
}

template <class Pack>
void multiply(const Product& p, const Pack& pack) {
  if (p.rows == 0) return;
  switch (p.layout.stored_bits) {
    case 2: return multiply_stored<2, true>(p, pack);
    case 4: return multiply_stored<4, true>(p, pack);
    default: return multiply_stored<8, false>(p, pack);
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
