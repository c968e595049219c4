// The driver of the matrix product. A block of rows of x stays in L2; columns of tiles of the weight stream past it.
#include "cpu/igemm.h"

#include "core/scratch.h"
#include "cpu/finish.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx_igemm.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

// One worker's memory.
struct Room {
  Piece* pieces;
  Run* runs;
  uint8_t* rows;       // of Source::fill
  int32_t* row_terms;  // [block_rows][k_groups]: sums of a row's codes, for weights below 8 bits (row_term)
  uint8_t* kept;       // a column of tiles as int8
  float* steps;        // [k_groups][most_blocks * 16]
};

constexpr int64_t most_sums =
    block * most(tile_limits.rows * tile_limits.blocks, tile_limits.few_rows* tile_limits.few_blocks);

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
        zeros_(p.weight + l_.zeros_at),
        large_sums_(l_.k / l_.k_groups * 255 >= sum_limit) {
    p.source.pieces(p.source.self, room.pieces);
    group_pieces_ = p.source.piece_count / l_.k_groups;
  }

  void load_rows(int64_t outer, int64_t first, int64_t count) {
    first_ = first;
    runs_ = p_.source.fill(p_.source.self, room_.rows, outer, first, count, room_.runs);
    if constexpr (B < 8) {
      int32_t* term = room_.row_terms;
      for (int64_t i = 0; i < runs_; ++i)
        for (int64_t r = 0; r < room_.runs[i].rows; ++r) {
          const uint8_t* x = room_.runs[i].x + r * room_.runs[i].stride;
          for (int64_t g = 0; g < l_.k_groups; ++g) {
            uint32_t sum = 0;
            for (int64_t j = g * group_pieces_; j < (g + 1) * group_pieces_; ++j)
              sum += sum_codes(x + room_.pieces[j].x, room_.pieces[j].n);
            *term++ = large_sums_ ? static_cast<int32_t>(sum) : row_term(sum);
          }
        }
    }
  }

  // Blocks [begin, begin + blocks) of group `outer` against the rows, `tile_rows` at a time at most.
  void column(int64_t outer, int64_t begin, int64_t blocks, int64_t tile_rows) {
    const int64_t at = outer * l_.blocks_per_outer + begin;
    const int64_t n_first = outer * l_.n_per_outer + begin * block;
    const int64_t n_valid = least(blocks * block, l_.n_per_outer - begin * block);
    load_steps(n_first, n_valid);
    TileArgs t{};
    t.weight = codes_ + at * l_.block_bytes;
    t.weight_pitch = l_.block_bytes;
    t.kept = room_.kept;
    t.kept_pitch = l_.k_padded * block;
    alignas(64) int32_t acc[most_sums];
    alignas(64) float y[most_sums];
    t.acc = acc;
    t.piece_count = group_pieces_;
    // Columns follow each other in memory: the tiles of this one fetch the next, a stretch each.
    t.ahead = codes_ + (at + blocks) * l_.block_bytes;
    bool kept = B == 8;
    int64_t row = 0;
    for (int64_t i = 0; i < runs_; ++i) {
      const Run& run = room_.runs[i];
      const int64_t tiles = ceil_div(run.rows, tile_rows);
      for (int64_t j = 0; j < tiles; ++j) {
        const int64_t from = run.rows * j / tiles, rows = run.rows * (j + 1) / tiles - from;
        const bool last = i + 1 == runs_ && j + 1 == tiles;
        const Tile tile = kept   ? tile_for<8, false>(rows, blocks)
                          : last ? tile_for<B, false>(rows, blocks)
                                 : tile_for<B, (B < 8)>(rows, blocks);
        t.x = run.x + from * run.stride;
        t.x_stride = run.stride;
        for (int64_t g = 0; g < l_.k_groups; ++g) {
          t.pieces = room_.pieces + g * group_pieces_;
          tile(t);
          if (B < 8 && large_sums_) subtract_zeros(row, rows, at, blocks, g, acc);
          if (p_.epilogue.per_row)
            finish_rows<true>(row, rows, at, blocks, g, acc, y, n_first, n_valid);
          else
            finish_rows<false>(row, rows, at, blocks, g, acc, y, n_first, n_valid);
        }
        if (!kept) {  // from now on the int8 weights
          kept = true;
          t.weight = t.kept;
          t.weight_pitch = t.kept_pitch;
        }
        t.ahead += l_.k_padded * 8;
        row += rows;
      }
    }
  }

 private:
  // Steps and bias of a column of tiles, 0 for channels that are not there. No bias is -0, which leaves every sum
  // alone.
  void load_steps(int64_t n_first, int64_t n_valid) {
    const Epilogue& e = p_.epilogue;
    for (int i = 0; i < most_blocks * block; ++i) bias_[i] = e.bias && i < n_valid ? e.bias[n_first + i] : -0.0f;
    for (int64_t g = 0; g < l_.k_groups; ++g)
      for (int i = 0; i < most_blocks * block; ++i)
        room_.steps[g * most_blocks * block + i] = i < n_valid ? e.weight_step[(n_first + i) * l_.k_groups + g] : 0.0f;
  }

  // For sums of codes beyond sum_limit; the terms are plain sums then.
  void subtract_zeros(int64_t row, int64_t rows, int64_t at, int64_t blocks, int64_t g, int32_t* acc) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < blocks * block; ++i) {
        const uint32_t zero = zeros_[((at + i / block) * l_.k_groups + g) * block + i % block];
        const uint32_t sum = static_cast<uint32_t>(room_.row_terms[(row + r) * l_.k_groups + g]);
        int32_t& value = acc[r * blocks * block + i];
        value = static_cast<int32_t>(static_cast<uint32_t>(value) - zero * sum);
      }
  }

  // Adds the sums of group g of K to y; with the last group, writes results. row: in the block of rows.
  template <bool per_row>
  void finish_rows(int64_t row, int64_t rows, int64_t at, int64_t blocks, int64_t g, const int32_t* acc, float* y,
                   int64_t n_first, int64_t n_valid) const {
    // Copies: what is written could alias the members, and every row would load them again.
    const Finish finish = finish_;
    const float* x_steps = p_.epilogue.x_step;
    const int32_t* x_zeros = p_.epilogue.x_zero;
    const int32_t* row_terms = room_.row_terms + row * l_.k_groups + g;
    void* const out = p_.out;
    const int64_t n = p_.n, k_groups = l_.k_groups;
    const bool first = g == 0, last = g + 1 == k_groups, zeros_matter = B < 8 && !large_sums_;
    for (int64_t b = 0; b < blocks; ++b) {
      const Words sums = load<Words>(sums_ + ((at + b) * k_groups + g) * sizeof(Words));
      Words zeros = {};
      if (zeros_matter) zeros = zero_terms(zeros_ + ((at + b) * k_groups + g) * block);
      const Floats steps = load<Floats>(room_.steps + (g * most_blocks + b) * block);
      const Floats bias = load<Floats>(bias_ + b * block);
      const int64_t valid = n_valid - b * block;
      Words zero_sums = sums * static_cast<uint32_t>(*x_zeros);
      Floats step = steps * *x_steps;
      int64_t to = (first_ + row) * n + n_first + b * block;
      const auto row_of = [&](int64_t r) __attribute__((always_inline)) {
        if constexpr (per_row) {
          zero_sums = sums * static_cast<uint32_t>(x_zeros[first_ + row + r]);
          step = steps * x_steps[first_ + row + r];
        }
        Words value = load<Words>(acc + (r * blocks + b) * block);
        if constexpr (B < 8) value = less_zeros(value, zeros, zeros_matter ? row_terms[r * k_groups] : 0);
        return scaled(value, zero_sums, step);
      };
      if (first && last) {
        for (int64_t r = 0; r < rows; ++r, to += n) finish.write(row_of(r) + bias, out, to, valid);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r, to += n) {
        const int64_t i = (r * blocks + b) * block;
        Floats value = row_of(r);
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
  const bool large_sums_;
  int64_t group_pieces_, runs_ = 0, first_ = 0;
  float bias_[most_blocks * block];
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
  const Cut c = cut(p.rows, p.source.row_unit, l, tile_limits, thread_count());
  Parts parts;
  const int64_t pieces = parts.take<Piece>(p.source.piece_count), runs = parts.take<Run>(c.block_rows);
  const int64_t rows = parts.take<uint8_t>(c.block_rows * p.source.row_bytes + p.source.fixed_bytes + 64);
  const int64_t row_terms = parts.take<int32_t>(B < 8 ? c.block_rows * l.k_groups : 0);
  const int64_t steps = parts.take<float>(l.k_groups * most_blocks * block);
  const int64_t kept = parts.take<uint8_t>(B < 8 ? c.tile_blocks * l.k_padded * block : 0);
  parallel_for(c.workers, 1, [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(thread_scratch(parts.bytes));
    const Room room{reinterpret_cast<Piece*>(memory + pieces),
                    reinterpret_cast<Run*>(memory + runs),
                    memory + rows,
                    reinterpret_cast<int32_t*>(memory + row_terms),
                    memory + kept,
                    reinterpret_cast<float*>(memory + steps)};
    Worker<B, Finish> worker(p, room, finish);
    int64_t loaded = -1;
    for (int64_t unit = c.units * begin / c.workers; unit < c.units * end / c.workers; ++unit) {
      const int64_t at = unit / c.columns, outer = at / c.row_blocks, first = at % c.row_blocks * c.block_rows;
      if (loaded != at) worker.load_rows(outer, first, least(c.block_rows, p.rows - first));
      loaded = at;
      const int64_t column = unit % c.columns, from = l.blocks_per_outer * column / c.columns;
      worker.column(outer, from, l.blocks_per_outer * (column + 1) / c.columns - from, c.tile_rows);
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
