// The driver of the matrix product. A block of rows of x stays in L2; columns of tiles of the weight stream past it.
#include "cpu/igemm.h"

#include "core/scratch.h"
#include "cpu/finish.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx_igemm.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t rows_budget = 256 * 1024;  // of L2 (1 MB and more), beside one column of unpacked weights
constexpr double work_per_thread = 1 << 20;  // products; below this a second thread costs more than it saves

// How the work is cut: units of one block of rows x one column of tiles, in the order outer, row block, column.
struct Cut {
  int64_t block_rows, row_blocks, columns, units, workers;
};

constexpr Cut cut(int64_t rows, int64_t row_unit, const PackedLayout& p, int64_t threads) {
  Cut c{};
  c.columns = ceil_div(p.blocks_per_outer, tile_blocks);
  const int64_t unit = row_unit > 1 ? row_unit : tile_rows;
  c.block_rows = least(round_up(most<int64_t>(1, rows_budget / p.k_padded), unit), round_up(rows, unit));
  // Few columns: threads share the rows.
  if (p.outer * c.columns < 4 * threads)
    c.block_rows = least(c.block_rows, round_up(ceil_div(rows, 2 * threads), unit));
  c.row_blocks = ceil_div(rows, c.block_rows);
  c.units = p.outer * c.row_blocks * c.columns;
  const double work = static_cast<double>(rows) * p.outer * p.blocks_per_outer * PackedLayout::block * p.k_padded;
  const double useful = least(work / work_per_thread, static_cast<double>(threads));
  c.workers = most<int64_t>(1, least(c.units, static_cast<int64_t>(useful)));
  return c;
}

// One worker's memory.
struct Room {
  Piece* pieces;
  Run* runs;
  uint8_t* rows;      // of Source::fill
  int32_t* row_sums;  // [block_rows][k_groups]: sums of a row's codes, for weights below 8 bits
  uint8_t* unpacked;  // a column of tiles as int8
  float* steps;       // [k_groups][tile_blocks * 16]
};

int32_t sum_codes(const uint8_t* x, int64_t n) {
  uint32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return static_cast<int32_t>(total);
}

template <int B, class Finish>
class Worker {
 public:
  Worker(const Product& p, const Room& room, const Finish& finish)
      : p_(p),
        l_(p.layout),
        room_(room),
        finish_(finish),
        codes_(p.weight + l_.codes_at),
        sums_(p.weight + l_.sums_at),
        zeros_(p.weight + l_.zeros_at) {
    p.source.pieces(p.source.self, room.pieces);
    group_pieces_ = p.source.piece_count / l_.k_groups;
  }

  void load_rows(int64_t outer, int64_t first, int64_t count) {
    first_ = first;
    raw_ = B < 8 && count <= tile_rows_unpacking;
    runs_ = p_.source.fill(p_.source.self, room_.rows, outer, first, count, room_.runs);
    if (!raw_) return;
    int32_t* sum = room_.row_sums;
    for (int64_t i = 0; i < runs_; ++i)
      for (int64_t r = 0; r < room_.runs[i].rows; ++r) {
        const uint8_t* x = room_.runs[i].x + r * room_.runs[i].stride;
        for (int64_t g = 0; g < l_.k_groups; ++g) {
          *sum = 0;
          for (int64_t j = 0; j < group_pieces_; ++j) {
            const Piece& piece = room_.pieces[g * group_pieces_ + j];
            *sum += sum_codes(x + piece.x, piece.n);
          }
          ++sum;
        }
      }
  }

  // Column `column` of group `outer` against the rows.
  void column(int64_t outer, int64_t column) {
    const int64_t in_outer = column * tile_blocks;
    const int64_t blocks = least<int64_t>(tile_blocks, l_.blocks_per_outer - in_outer);
    const int64_t at = outer * l_.blocks_per_outer + in_outer;
    const int64_t n_first = outer * l_.n_per_outer + in_outer * block;
    const int64_t n_valid = least(blocks * block, l_.n_per_outer - in_outer * block);
    load_steps(n_first, n_valid);
    TileArgs t{};
    t.weight = codes_ + at * l_.block_bytes;
    t.weight_pitch = l_.block_bytes;
    if constexpr (B < 8) {
      if (!raw_) {
        for (int64_t b = 0; b < blocks; ++b)
          unpack_weights<B>(t.weight + b * l_.block_bytes, zeros_ + (at + b) * l_.k_groups * block, l_,
                            room_.unpacked + b * l_.k_padded * block);
        t.weight = room_.unpacked;
        t.weight_pitch = l_.k_padded * block;
      }
    }
    alignas(64) int32_t acc[tile_rows * tile_blocks * block];
    alignas(64) float y[tile_rows * tile_blocks * block];
    t.acc = acc;
    t.piece_count = group_pieces_;
    int64_t row = 0;
    for (int64_t i = 0; i < runs_; ++i) {
      const Run& run = room_.runs[i];
      for (int64_t r = 0; r < run.rows;) {
        const int64_t rows = least<int64_t>(tile_rows, run.rows - r);
        const Tile tile = raw_ ? tile_for<B>(rows, blocks) : tile_for<8>(rows, blocks);
        // Columns follow each other in memory: the tiles of this one fetch the next, a stretch each.
        t.ahead = codes_ + (at + blocks) * l_.block_bytes + row / tile_rows * (l_.k_padded * block);
        t.x = run.x + r * run.stride;
        t.x_stride = run.stride;
        for (int64_t g = 0; g < l_.k_groups; ++g) {
          t.pieces = room_.pieces + g * group_pieces_;
          tile(t);
          const auto finish = [&](auto per_row, auto raw) {
            finish_rows<per_row, raw>(row, rows, at, blocks, g, acc, y, n_first, n_valid);
          };
          constexpr std::true_type yes;
          constexpr std::false_type no;
          if (p_.epilogue.per_row)
            raw_ ? finish(yes, yes) : finish(yes, no);
          else
            raw_ ? finish(no, yes) : finish(no, no);
        }
        r += rows;
        row += rows;
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

  // Adds the sums of group g of K to y; with the last group, writes results. row: in the block of rows.
  template <bool per_row, bool raw>
  void finish_rows(int64_t row, int64_t rows, int64_t at, int64_t blocks, int64_t g, const int32_t* acc, float* y,
                   int64_t n_first, int64_t n_valid) const {
    // Copies: what is written could alias the members, and every row would load them again.
    const Finish finish = finish_;
    const float* x_steps = p_.epilogue.x_step;
    const int32_t* x_zeros = p_.epilogue.x_zero;
    const int32_t* row_sums = room_.row_sums + row * l_.k_groups + g;
    void* const out = p_.out;
    const int64_t n = p_.n, k_groups = l_.k_groups;
    const bool first = g == 0, last = g + 1 == k_groups;
    for (int64_t b = 0; b < blocks; ++b) {
      const Words sums = load<Words>(sums_ + ((at + b) * k_groups + g) * sizeof(Words));
      Words zeros = {};
      if constexpr (raw)
        zeros = __builtin_convertvector(load<Codes>(zeros_ + ((at + b) * k_groups + g) * block), Words);
      const Floats steps = load<Floats>(room_.steps + (g * tile_blocks + b) * block);
      const Floats bias = load<Floats>(bias_ + b * block);
      const int64_t valid = n_valid - b * block;
      const Words all_zero_sums = sums * static_cast<uint32_t>(*x_zeros);
      Floats step = steps * *x_steps;
      int64_t to = (first_ + row) * n + n_first + b * block;
      for (int64_t r = 0; r < rows; ++r, to += n) {
        Words zero_sums = all_zero_sums;
        if constexpr (per_row) {
          zero_sums = sums * static_cast<uint32_t>(x_zeros[first_ + row + r]);
          step = steps * x_steps[first_ + row + r];
        }
        if constexpr (raw) zero_sums += zeros * static_cast<uint32_t>(row_sums[r * k_groups]);
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
  int64_t group_pieces_, runs_ = 0, first_ = 0;
  bool raw_ = false;
  float bias_[tile_blocks * block];
};

// Hands out parts of the scratch.
class Parts {
 public:
  template <class T>
  int64_t take(int64_t count) {
    const int64_t at = bytes;
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t bytes = 0;
};

template <int B, class Finish>
void multiply_stored(const Product& p, const Finish& finish) {
  const PackedLayout& l = p.layout;
  const Cut c = cut(p.rows, p.source.row_unit, l, thread_count());
  Parts parts;
  const int64_t pieces = parts.take<Piece>(p.source.piece_count), runs = parts.take<Run>(c.block_rows);
  const int64_t rows = parts.take<uint8_t>(c.block_rows * p.source.row_bytes + p.source.fixed_bytes + 64);
  const int64_t row_sums = parts.take<int32_t>(B < 8 ? c.block_rows * l.k_groups : 0);
  const int64_t steps = parts.take<float>(l.k_groups * tile_blocks * block);
  const int64_t unpacked = parts.take<uint8_t>(B < 8 ? tile_blocks * l.k_padded * block : 0);
  parallel_for(c.workers, 1, [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(thread_scratch(parts.bytes));
    const Room room{reinterpret_cast<Piece*>(memory + pieces),
                    reinterpret_cast<Run*>(memory + runs),
                    memory + rows,
                    reinterpret_cast<int32_t*>(memory + row_sums),
                    memory + unpacked,
                    reinterpret_cast<float*>(memory + steps)};
    Worker<B, Finish> worker(p, room, finish);
    int64_t loaded = -1;
    for (int64_t unit = c.units * begin / c.workers; unit < c.units * end / c.workers; ++unit) {
      const int64_t at = unit / c.columns, outer = at / c.row_blocks, first = at % c.row_blocks * c.block_rows;
      if (loaded != at) worker.load_rows(outer, first, least(c.block_rows, p.rows - first));
      loaded = at;
      worker.column(outer, unit % c.columns);
    }
  });
}

}  // namespace

void multiply(const Product& p) {
  if (p.rows == 0) return;
#if defined(QK_ISA_AMX)
  if (multiply_on_tiles(p)) return;
#endif
  with_finish(p.epilogue, [&](const auto& finish) {
    switch (p.layout.stored_bits) {
      case 2: return multiply_stored<2>(p, finish);
      case 4: return multiply_stored<4>(p, finish);
      default: return multiply_stored<8>(p, finish);
    }
  });
}

}  // namespace qk::cpu::QK_ISA
