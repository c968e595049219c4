// The driver of the matrix product. A block of rows of x stays in L2; columns of tiles of the weight stream past it.
#include "cpu/igemm.h"

#include "core/scratch.h"
#include "cpu/finish.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx_igemm.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

// n codes as 16-bit words.
inline void widen(const uint8_t* codes, int64_t n, uint8_t* to) {
  int64_t i = 0;
#if defined(QK_ISA_AVX2)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i),
                        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
#endif
  for (; i < n; ++i) {
    const uint16_t word = codes[i];
    std::memcpy(to + 2 * i, &word, 2);
  }
}

// One worker's memory.
struct Room {
  Piece* pieces;
  Run* runs;
  uint8_t* rows;       // of Source::fill
  uint8_t* copies;     // of the codes: as 16-bit words, where they are multiplied as such, or moved
  int32_t* row_terms;  // [rows of a tile][k_groups]: sums of codes, where zeros come behind the product (row_term)
  int32_t* row_zeros;  // [rows of a tile], of moved codes
  uint8_t* kept;       // a column of tiles as int8 or words
  uint32_t* start;     // TileArgs
  float* steps;        // these: Terms
  uint32_t* sums;
  uint32_t* zeros;
};

constexpr int64_t most_sums =
    block * most<int64_t>(tile_limits.rows * tile_limits.blocks, tile_limits.few_rows* tile_limits.few_blocks);

template <int B, class Finish>
class Worker {
  static constexpr bool words = B == 8 && words_of_8_bits;
  // A sum of that many products stays in int32 if weights are codes where they lie in their byte.
  static constexpr int64_t longest_behind = tile_moves ? INT32_MAX / (128 * 255) : INT64_MAX;
  static constexpr int move = tile_moves ? 128 : 0;

 public:
  Worker(const Product& p, const Room& room, int64_t tile_rows, const Finish& finish)
      : p_(p),
        l_(p.layout),
        room_(room),
        tile_rows_(tile_rows),
        finish_(finish),
        codes_(p.weight + l_.codes_at),
        sums_(p.weight + l_.sums_at),
        zeros_(p.weight + l_.zeros_at) {
    p.source.pieces(p.source.self, room.pieces);
    group_pieces_ = p.source.piece_count / l_.k_groups;
    const Piece& last = room.pieces[p.source.piece_count - 1];
    row_reach_ = last.x + round_up(last.n, 4);
    if constexpr (words)
      for (int64_t i = 0; i < p.source.piece_count; ++i) room.pieces[i].x *= 2;
  }

  void load_rows(int64_t outer, int64_t first, int64_t count) {
    first_ = first;
    runs_ = p_.source.fill(p_.source.self, room_.rows, outer, first, count, room_.runs);
    if constexpr (words) widen_rows();
    tiles_ = 0;
    for (int64_t i = 0; i < runs_; ++i) tiles_ += ceil_div(room_.runs[i].rows, tile_rows_);
    if (zeros_behind()) prepare_tile(room_.runs[0]);
  }

  // Blocks [begin, begin + blocks) of group `outer` against the rows.
  void column(int64_t outer, int64_t begin, int64_t blocks) {
    const int64_t at = outer * l_.blocks_per_outer + begin;
    const int64_t n_first = outer * l_.n_per_outer + begin * block;
    const int64_t n_valid = least(blocks * block, l_.n_per_outer - begin * block);
    TileArgs t{};
    Terms& terms = t.terms;
    load_terms(at, blocks, n_first, n_valid, terms);
    t.weight = codes_ + at * l_.block_bytes;
    t.weight_pitch = l_.block_bytes;
    t.zeros = zeros_ + at * l_.k_groups * block;
    t.zeros_pitch = l_.k_groups * block;
    t.kept = room_.kept;
    t.kept_pitch = l_.k_padded * block * kept_bytes<B>;
    alignas(64) int32_t acc[most_sums];
    alignas(64) float y[most_sums];
    t.acc = acc;
    t.start = room_.start;
    t.y = y;
    t.pieces = room_.pieces;
    t.piece_count = p_.source.piece_count;
    t.k_groups = l_.k_groups;
    t.group_pieces = group_pieces_;
    // Columns follow each other in memory: the tiles of this one fetch the next, a stretch each.
    t.ahead = codes_ + (at + blocks) * l_.block_bytes;
    constexpr int width = tile_width<B>;
    constexpr bool keeps = B < 8 || words;
    bool kept = !keeps;
    const bool few_tiles = tiles_ <= 3, behind = zeros_behind(), moved = behind && tile_moves;
    int64_t row = 0;
    for (int64_t i = 0; i < runs_; ++i) {
      const Run& run = room_.runs[i];
      const int64_t tiles = ceil_div(run.rows, tile_rows_);
      for (int64_t j = 0; j < tiles; ++j) {
        const int64_t from = run.rows * j / tiles, rows = run.rows * (j + 1) / tiles - from;
        const Tile tile = kept     ? tile_for<8 * kept_bytes<B>, false, width>(rows, blocks)
                          : behind ? tile_for<B, false, width>(rows, blocks)
                                   : tile_for<B, keeps, width>(rows, blocks);
        t.x = run.x + from * run.stride;
        t.x_stride = run.stride;
        if (p_.epilogue.per_row) {
          terms.row_step = p_.epilogue.x_step + first_ + row;
          terms.row_zero = moved ? room_.row_zeros : p_.epilogue.x_zero + first_ + row;
        }
        terms.row_terms = room_.row_terms + row * l_.k_groups;
        t.hurry = few_tiles;
        if (l_.k_groups > 1) clear(y, rows * blocks);
        tile(t);
        const int64_t to = (first_ + row) * p_.n + n_first;
        if (l_.k_groups > 1)
          write(rows, blocks, to, n_valid, [&](int64_t r, int64_t b) __attribute__((always_inline)) {
            return load<Floats>(y + (r * blocks + b) * block);
          });
        else if (tame_ && !terms.zeros)
          write_units(terms, rows, blocks, to, n_valid, acc);
        else
          with_flags(p_.epilogue.per_row, terms.zeros, [&](auto per_row, auto zeros) {
            write(rows, blocks, to, n_valid, [&](int64_t r, int64_t b) __attribute__((always_inline)) {
              return terms.value<per_row, zeros>(load<Words>(acc + (r * blocks + b) * block), 0, b, r);
            });
          });
        if (!kept) {  // from now on the int8 weights
          kept = true;
          t.weight = t.kept;
          t.weight_pitch = t.kept_pitch;
        }
        t.ahead += l_.k_padded * (few_tiles ? 24 : 8);
        row += rows;
      }
    }
  }

 private:
  // Of one tile a column, but for the longest sums: its weights are used once, the row's codes by all columns.
  bool zeros_behind() const { return B < 8 && tiles_ == 1 && l_.k / l_.k_groups <= longest_behind; }

  // What zeros that come behind need of the rows.
  void prepare_tile(Run& run) {
    int32_t* term = room_.row_terms;
    for (int64_t r = 0; r < run.rows; ++r) {
      const uint8_t* x = run.x + r * run.stride;
      for (int64_t g = 0; g < l_.k_groups; ++g) {
        int32_t sum = 0;
        for (int64_t j = g * group_pieces_; j < (g + 1) * group_pieces_; ++j)
          sum += static_cast<int32_t>(sum_codes(x + room_.pieces[j].x, room_.pieces[j].n) - move * room_.pieces[j].n);
        *term++ = row_term(sum);
      }
    }
    if constexpr (tile_moves) move_rows(run);
  }

  void move_rows(Run& run) {
    const auto move_codes = [](const uint8_t* from, int64_t n, uint8_t* to) {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ 128;
    };
    if (p_.source.row_bytes == 0) {
      const int64_t pitch = row_pitch(row_reach_);
      for (int64_t r = 0; r < run.rows; ++r) move_codes(run.x + r * run.stride, row_reach_, room_.copies + r * pitch);
      run = {room_.copies, pitch, run.rows};
    } else {
      uint8_t* const x = room_.rows + (run.x - room_.rows);
      move_codes(x, (run.rows - 1) * run.stride + row_reach_, x);
    }
    if (p_.epilogue.per_row)
      for (int64_t r = 0; r < run.rows; ++r) room_.row_zeros[r] = p_.epilogue.x_zero[first_ + r] - move;
  }

  // Copies that rows share are widened once, rows that are read in place one by one.
  void widen_rows() {
    if (p_.source.row_bytes == 0) {
      const int64_t pitch = row_pitch(2 * row_reach_);
      uint8_t* to = room_.copies;
      for (int64_t i = 0; i < runs_; ++i) {
        Run& run = room_.runs[i];
        const Run from = run;
        run = {to, pitch, from.rows};
        for (int64_t r = 0; r < from.rows; ++r, to += pitch) widen(from.x + r * from.stride, row_reach_, to);
      }
    } else {
      int64_t used = 0;
      for (int64_t i = 0; i < runs_; ++i) {
        Run& run = room_.runs[i];
        const int64_t at = run.x - room_.rows;
        used = most(used, at + (run.rows - 1) * run.stride + row_reach_);
        run = {room_.copies + 2 * at, 2 * run.stride, run.rows};
      }
      widen(room_.rows, used, room_.copies);
    }
  }

  // What the values of a column need; nothing for channels that are not there. No bias is -0, which leaves every sum
  // alone.
  void load_terms(int64_t at, int64_t blocks, int64_t n_first, int64_t n_valid, Terms& t) {
    const Epilogue& e = p_.epilogue;
    const bool per_row = e.per_row;
    const float x_step = per_row ? 1.0f : *e.x_step;
    const uint32_t x_zero = per_row ? 1 : static_cast<uint32_t>(*e.x_zero - (zeros_behind() ? move : 0));
    const int64_t k_groups = l_.k_groups;
    tame_ = Finish::by_units && !per_row && k_groups == 1;
    const bool starts = tile_starts && !per_row && k_groups == 1;
    // The zeros' share of a single row is no different from that of the others.
    const bool one_row = starts && room_.runs[0].rows == 1;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = n_first + b * block, valid = n_valid - b * block;
      const Floats bias = e.bias ? load_some<Floats>(e.bias + n, valid) : -(Floats{});
      std::memcpy(bias_ + b * block, &bias, sizeof bias);
      Words start = {};
      for (int64_t g = 0; g < k_groups; g += block) {
        Floats steps[block];
        load_steps(e.weight_step + n * k_groups, k_groups, g, valid, steps);
        for (int64_t i = 0; i < block && g + i < k_groups; ++i) {
          const int64_t from = (at + b) * k_groups + g + i, to = (g + i) * Terms::pitch + b * block;
          const Floats step = steps[i] * x_step;  // by 1 is exact
          Words sums = load<Words>(sums_ + from * sizeof(Words)) * x_zero;
          if (starts) start = start - sums, sums = Words{};
          if (zeros_behind()) {
            const Words zeros = zero_terms(zeros_ + from * block);
            if (one_row)
              start = less_zeros(start, zeros, room_.row_terms[0]);
            else
              std::memcpy(room_.zeros + to, &zeros, sizeof zeros);
          }
          std::memcpy(room_.steps + to, &step, sizeof step);
          if constexpr (Finish::by_units)
            tame_ = tame_ && finish_.tame(step, bias, 255.0f * worst_weight(B) * static_cast<float>(l_.k));
          std::memcpy(room_.sums + to, &sums, sizeof sums);
        }
      }
      std::memcpy(room_.start + b * block, &start, sizeof start);
    }
    t.steps = room_.steps;
    t.sums = room_.sums;
    t.zeros = zeros_behind() && !one_row ? room_.zeros : nullptr;
    t.k_groups = k_groups;
  }

  // -0 leaves every sum alone.
  static void clear(float* y, int64_t vectors) {
    const Floats nothing = -(Floats{});
    for (int64_t i = 0; i < vectors; ++i) std::memcpy(y + i * block, &nothing, sizeof nothing);
  }

  // Sums to codes, where tame_ allows.
  QK_INLINE void write_units(const Terms& t, int64_t rows, int64_t blocks, int64_t to, int64_t n_valid,
                             const int32_t* acc) const {
    if constexpr (Finish::by_units)
      finish_.write_units(acc, rows, blocks, t.sums, t.steps, bias_, p_.out, to, p_.n, n_valid);
  }

  // value(r, b) and the bias to results.
  template <class Value>
  QK_INLINE void write(int64_t rows, int64_t blocks, int64_t to, int64_t n_valid, const Value& value) const {
    const Finish finish = finish_;  // a copy: what is written could alias the member
    void* const out = p_.out;
    const int64_t n = p_.n;
    for (int64_t b = 0; b < blocks; ++b, to += block) {
      const Floats bias = load<Floats>(bias_ + b * block);
      const int64_t valid = n_valid - b * block;
      if (valid >= block) {
        for (int64_t r = 0; r < rows; ++r) finish.write(value(r, b) + bias, out, to + r * n, block);
      } else {
        for (int64_t r = 0; r < rows; ++r) finish.write(value(r, b) + bias, out, to + r * n, valid);
      }
    }
  }

  const Product& p_;
  const PackedLayout& l_;
  Room room_;
  const int64_t tile_rows_;
  Finish finish_;
  const uint8_t* codes_;
  const uint8_t* sums_;  // bytes: a view may begin anywhere
  const uint8_t* zeros_;
  bool tame_ = false;                                                    // Finish::tame, of all blocks of the column
  int64_t group_pieces_, row_reach_, runs_ = 0, tiles_ = 0, first_ = 0;  // row_reach: bytes of a row
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
  const int64_t row_bytes = c.block_rows * p.source.row_bytes + p.source.fixed_bytes + 64;
  const int64_t rows = parts.take<uint8_t>(row_bytes);
  const int64_t few = B < 8 ? least(c.block_rows, c.tile_rows) : 0;
  const int64_t row_terms = parts.take<int32_t>(few * l.k_groups), row_zeros = parts.take<int32_t>(few);
  const int64_t copies = parts.take<uint8_t>(B == 8 && words_of_8_bits && p.source.row_bytes > 0 ? 2 * row_bytes
                                             : B == 8 && words_of_8_bits             ? c.block_rows * row_pitch(2 * l.k)
                                             : tile_moves && p.source.row_bytes == 0 ? few * row_pitch(l.k)
                                                                                     : 0);
  const int64_t terms = l.k_groups * Terms::pitch, start = parts.take<uint32_t>(Terms::pitch);
  const int64_t steps = parts.take<float>(terms), sums = parts.take<uint32_t>(terms);
  const int64_t zeros = parts.take<uint32_t>(B < 8 ? terms : 0);
  const int64_t kept =
      parts.take<uint8_t>(B < 8 || words_of_8_bits ? c.tile_blocks * l.k_padded * block * kept_bytes<B> : 0);
  parallel_for(c.workers, 1, [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(thread_scratch(parts.bytes));
    const Room room{reinterpret_cast<Piece*>(memory + pieces),
                    reinterpret_cast<Run*>(memory + runs),
                    memory + rows,
                    memory + copies,
                    reinterpret_cast<int32_t*>(memory + row_terms),
                    reinterpret_cast<int32_t*>(memory + row_zeros),
                    memory + kept,
                    reinterpret_cast<uint32_t*>(memory + start),
                    reinterpret_cast<float*>(memory + steps),
                    reinterpret_cast<uint32_t*>(memory + sums),
                    reinterpret_cast<uint32_t*>(memory + zeros)};
    Worker<B, Finish> worker(p, room, c.tile_rows, finish);
    int64_t unit = c.units * begin / c.workers, column = unit % c.columns;
    for (const int64_t stop = c.units * end / c.workers; unit < stop; column = 0) {
      const int64_t at = unit / c.columns, outer = at / c.row_blocks, first = at % c.row_blocks * c.block_rows;
      worker.load_rows(outer, first, least(c.block_rows, p.rows - first));
      int64_t from = l.blocks_per_outer * column / c.columns;
      for (; column < c.columns && unit < stop; ++column, ++unit) {
        const int64_t to = l.blocks_per_outer * (column + 1) / c.columns;
        worker.column(outer, from, to - from);
        from = to;
      }
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
