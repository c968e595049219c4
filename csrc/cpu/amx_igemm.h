// The driver of the matrix product on tiles: blocks of 32 rows x 32 channels, 2 x 2 tiles of sums. While the products
// of one block run, the results of the block before are finished, the weights of the next steps are unpacked and the
// next columns fetched into L2.
#pragma once
#include "core/scratch.h"
#include "cpu/amx.h"
#include "cpu/igemm.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t few_rows = 6;  // below, vpdpbusd is as fast (768 x 3072, 8 and 4 bits)
// Rows of x in L2, which has 2 MB where there are tiles: few, so that their results stay there too, unless the weights
// come from farther away for each block of rows.
constexpr int64_t tiles_budget(int64_t weight_bytes) { return weight_bytes > 1024 * 1024 ? 1024 * 1024 : 256 * 1024; }

struct TilePlan {
  int64_t steps;  // of 64 codes of K
  int64_t block_rows, row_blocks, columns, units, workers;
};

inline TilePlan plan_tiles(const Product& p, int64_t threads) {
  const PackedLayout& l = p.layout;
  TilePlan t{};
  t.steps = l.k_padded / tile_k;
  t.columns = ceil_div(l.blocks_per_outer, 2);
  const int64_t unit = p.source.row_unit > 1 ? p.source.row_unit : 2 * side;
  const int64_t row_bytes = p.source.row_bytes > 0 ? p.source.row_bytes : l.k_padded;
  t.block_rows = least(round_up(most<int64_t>(1, tiles_budget(l.bytes) / row_bytes), unit), round_up(p.rows, unit));
  if (l.outer * t.columns < 4 * threads)
    t.block_rows = least(t.block_rows, round_up(ceil_div(p.rows, 2 * threads), unit));
  t.row_blocks = ceil_div(p.rows, t.block_rows);
  t.block_rows = least(t.block_rows, round_up(ceil_div(p.rows, t.row_blocks), unit));  // of equal size
  t.row_blocks = ceil_div(p.rows, t.block_rows);
  t.units = l.outer * t.row_blocks * t.columns;
  constexpr double work_per_thread = 1 << 21;
  const double work = static_cast<double>(p.rows) * static_cast<double>(l.blocks() * PackedLayout::block) *
                      static_cast<double>(l.k_padded);
  const double useful = least(work / work_per_thread, static_cast<double>(threads));
  t.workers = most<int64_t>(1, least(t.units, static_cast<int64_t>(useful)));
  return t;
}

// One worker's memory.
struct TileRoom {
  Piece* pieces;
  Run* runs;
  uint8_t* rows;  // of Source::fill
  int64_t rows_bytes;
  TileRows* tiles;
  uint8_t* copies;     // of tiles of rows that cannot be read where they lie
  int64_t *at, *row;   // [steps]: where a step begins in a row of x, and in a copied one
  int64_t* codes;      // [steps]: of 64
  uint8_t* unpacked;   // [2][k_padded * 16]
  int32_t* sums;       // [sums_rooms][block_sums]
  Channels* channels;  // [2]
};
constexpr int64_t block_sums = 2 * side * 2 * side;

// Long rows are gone through in stretches of K whose weights, of 32 channels, stay in L1; between them the sums of
// every block wait in memory.
constexpr int64_t stretch_steps = 14;
constexpr int64_t stretches(int64_t steps) { return steps > stretch_steps + 4 ? ceil_div(steps, stretch_steps) : 1; }

template <int B, bool codes, bool added>
class TileWorker {
  static constexpr int64_t step_bytes = tile_bytes * B / 8;  // of packed weights, 64 codes of 16 channels

 public:
  TileWorker(const Product& p, const TilePlan& plan, const TileRoom& room, const TileFinish& finish)
      : p_(p), l_(p.layout), plan_(plan), room_(room), finish_(finish), done_channels_(room.channels) {
    for (int64_t i = 0, s = 0; i < l_.segments; ++i)
      for (int64_t k = 0; k < l_.segment_k; k += tile_k, ++s) {
        room.at[s] = room.pieces[i].x + k;
        room.row[s] = s * tile_k;
        room.codes[s] = least(tile_k, l_.segment_k - k);
      }
  }

  void load_rows(TileState& state, int64_t outer, int64_t first, int64_t count) {
    flush();
    const int64_t runs = p_.source.fill(p_.source.self, room_.rows, outer, first, count, room_.runs);
    int64_t longest = 0;
    for (int64_t i = 0; i < runs; ++i) longest = most(longest, room_.runs[i].rows);
    // Products take as long as tiles have rows, so tiles are cut evenly.
    height_ = ceil_div(longest, ceil_div(longest, side));
    state.set_rows(height_);
    tiles_ = 0;
    uint8_t* copy = room_.copies;
    for (int64_t i = 0; i < runs; ++i) {
      const Run& run = room_.runs[i];
      const bool ours = run.x >= room_.rows && run.x < room_.rows + room_.rows_bytes;
      // Rows of the caller's that a step of 64 codes begins in may end behind his memory.
      const int64_t rows_behind =
          ours || l_.segment_k % tile_k == 0 ? 0 : ceil_div(tile_k, most<int64_t>(1, run.stride));
      for (int64_t r = 0; r < run.rows; r += height_) {
        // The last tile begins early enough to be whole; rows that it shares with the one before are not written again.
        const int64_t from = most<int64_t>(0, least(r, run.rows - height_));
        TileRows& t = room_.tiles[tiles_];
        const int64_t count = least(from + height_, run.rows) - r;
        t = {run.x + from * run.stride, run.stride, false, r - from, count, first};
        first += count;
        ++tiles_;
        if (from + height_ + rows_behind > run.rows) copy_rows(t, least(height_, run.rows - from), copy);
      }
    }
  }

  void column(int64_t outer, int64_t column) {
    const int64_t in_outer = column * 2, blocks = least<int64_t>(2, l_.blocks_per_outer - in_outer);
    const int64_t at = outer * l_.blocks_per_outer + in_outer;
    const uint8_t* const weight = p_.weight + l_.codes_at + at * l_.block_bytes;
    channels_ = room_.channels + (channels_ == room_.channels ? 1 : 0);
    const int64_t valid = least(blocks * side, l_.n_per_outer - in_outer * side);
    channels_->first = outer * l_.n_per_outer + in_outer * side;
    channels_->there = valid >= 2 * side ? ~0u : (1u << valid) - 1;
    finish_.load(*channels_, p_.weight + l_.sums_at + at * side * 4, blocks, l_.k);
    two_ = blocks == 2;
    packed_[0] = weight;
    packed_[1] = weight + (two_ ? l_.block_bytes : 0);
    const int64_t pairs = ceil_div(tiles_, 2);
    ahead_ = weight + blocks * l_.block_bytes;
    ahead_end_ = ahead_ + 2 * l_.block_bytes;
    ahead_lines_ = ceil_div(2 * l_.block_bytes / 64, pairs * plan_.steps);
    if constexpr (B < 8) {
      const uint8_t* const zeros = p_.weight + l_.zeros_at + at * side;
      zero_[0] = spread16(zeros);
      zero_[1] = spread16(zeros + (two_ ? side : 0));
    }
    if (tiles_ == 1 || (tiles_ == 2 && paired(0))) return block_of<true, true>(0, 0, plan_.steps, room_.sums);
    const int64_t parts = stretches(plan_.steps);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = plan_.steps * part / parts, end = plan_.steps * (part + 1) / parts;
      for (int64_t i = 0, block = 0; i < tiles_; ++block) {
        // Sums that are finished at once take turns in two rooms, others have one each.
        int32_t* const sums = room_.sums + (parts > 1 ? block : block % 2) * block_sums;
        if (B < 8 && i == 0)
          block_of<true, false>(i, begin, end, sums);
        else
          block_of<false, false>(i, begin, end, sums);
        i += paired(i) ? 2 : 1;
      }
    }
  }

  // Finishes the last block.
  void flush() {
    if (pairs_left_ > 0) finish_pairs(finish_.template constants<added>(*done_channels_), pairs_left_);
  }

 private:
  void copy_rows(TileRows& t, int64_t rows, uint8_t*& copy) const {
    const int64_t stride = plan_.steps * tile_k;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < plan_.steps; ++s)
        std::memcpy(copy + r * stride + s * tile_k, t.x + r * t.stride + room_.at[s],
                    static_cast<size_t>(room_.codes[s]));
    t.x = copy;
    t.stride = stride;
    t.copied = true;
    copy += rows * stride;
  }

  // Whether a tile and the next are gone through together.
  bool paired(int64_t tile) const {
    return tile + 1 < tiles_ && room_.tiles[tile].copied == room_.tiles[tile + 1].copied;
  }

  // to: of the unpacked steps.
  QK_INLINE void unpack_step(int64_t s, int64_t to) {
    if constexpr (B < 8) {
      unpack_tile<B>(packed_[0] + s * step_bytes, zero_[0], room_.codes[s], room_.unpacked + to * tile_bytes);
      if (two_)
        unpack_tile<B>(packed_[1] + s * step_bytes, zero_[1], room_.codes[s],
                       room_.unpacked + l_.k_padded * side + to * tile_bytes);
    }
  }

  // The weights of 3 KB later in both blocks; behind their end, those of the next column.
  QK_INLINE void fetch(int64_t s, int64_t end) const {
    constexpr int64_t steps = 3072 / step_bytes;
    const uint8_t* const next = packed_[0] + (s + steps) * step_bytes + (s + steps < end ? 0 : l_.block_bytes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < step_bytes; i += 64) {
      __builtin_prefetch(next + i, 0, 3);
      __builtin_prefetch(next + l_.block_bytes + i, 0, 3);
    }
  }

  // `pairs` more of the block before.
  QK_INLINE void finish_pairs(const TileFinish::Constants& c, int64_t pairs) {
    pairs = least(pairs, pairs_left_);
    if (pairs <= 0) return;
    Left left = left_;  // a copy: what is written could alias the member
    for (int64_t i = 0; i < pairs; ++i) {
      if (left.count <= 0) left = left_next_;
      finish_.template pair<codes, added>(left.sums, *done_channels_, c, left.to, left.count > 1);
      left.sums += 2 * 2 * side, left.to += 2, left.count -= 2;
    }
    left_ = left;
    pairs_left_ -= pairs;
  }

  // unpacking: with this block, the first of its column, the weights are unpacked for all of them. only: there is no
  // other, so unpacked weights stay in a few lines of L1, and columns take so little time that what comes soon is
  // fetched, not the next one.
  template <bool unpacking, bool only>
  void block_of(int64_t tile, int64_t begin, int64_t end, int32_t* sums) {
    const bool pair = paired(tile);
    const TileRows &a = room_.tiles[tile], &b = room_.tiles[tile + (pair ? 1 : 0)];
    constexpr int64_t early = 2;  // steps: what is stored must have reached L1 before a tile loads it
    constexpr int64_t ring = only && B < 8 ? 3 : -1;  // step s of the weights lies at s & ring
    if constexpr (unpacking)
      for (int64_t s = begin; s < least(begin + early, end); ++s) unpack_step(s, s & ring);
    const int64_t sums_stride = 2 * side * 4;
    const int32_t* const start = begin == 0 ? channels_->start : sums;
    const int64_t start_stride = begin == 0 ? 0 : sums_stride, lower = begin == 0 ? 0 : block_sums / 2;
    load_tile<0>(start, start_stride);
    load_tile<1>(start + side, start_stride);
    // Products of a single tile of rows would wait for each other: its sums are split, into those of even and odd
    // steps.
    const bool split = only && !pair;
    alignas(64) static constexpr int32_t nothing[side] = {};
    load_tile<2>(split ? nothing : start + lower, start_stride);
    load_tile<3>(split ? nothing : start + lower + side, start_stride);
    const uint8_t* const w0 = B < 8 ? room_.unpacked : packed_[0];
    const uint8_t* const w1 = B < 8 ? room_.unpacked + l_.k_padded * side : packed_[1];
    const int64_t* const at = a.copied ? room_.row : room_.at;
    const uint8_t *const xa = a.x, *const xb = b.x;
    const int64_t stride_a = a.stride, stride_b = b.stride;
    const bool two = two_;
    const int64_t per_step = ceil_div(pairs_left_, end - begin);
    const TileFinish::Constants c = finish_.template constants<added>(*done_channels_);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t w = (s & ring) * tile_bytes;
      load_tile<6>(w0 + w, 64);
      load_tile<4>(xa + at[s], stride_a);
      if (split && s % 2 == 1) {
        products<2, 4, 6>();
        if (two) {
          load_tile<7>(w1 + w, 64);
          products<3, 4, 7>();
        }
      } else {
        products<0, 4, 6>();
        if (two) {
          load_tile<7>(w1 + w, 64);
          products<1, 4, 7>();
        }
      }
      if (pair) {
        load_tile<5>(xb + at[s], stride_b);
        products<2, 5, 6>();
        if (two) products<3, 5, 7>();
      }
      if constexpr (unpacking)
        if (s + early < end) unpack_step(s + early, (s + early) & ring);
      if constexpr (only)
        fetch(s, end);
      else
        for (int64_t i = 0; i < ahead_lines_ && ahead_ < ahead_end_; ++i, ahead_ += 64)
          __builtin_prefetch(ahead_, 0, 2);
      finish_pairs(c, per_step);
    }
    store_tile<0>(sums, sums_stride);
    if (two) store_tile<1>(sums + side, sums_stride);
    if (pair) {
      store_tile<2>(sums + block_sums / 2, sums_stride);
      if (two) store_tile<3>(sums + block_sums / 2 + side, sums_stride);
    }
    if (split) {
      int32_t* const odd = sums + block_sums / 2;
      store_tile<2>(odd, sums_stride);
      if (two) store_tile<3>(odd + side, sums_stride);
      for (int64_t i = 0; i < height_ * 2 * side; i += side)
        _mm512_store_si512(sums + i, _mm512_add_epi32(_mm512_load_si512(sums + i), _mm512_load_si512(odd + i)));
    }
    if (end < plan_.steps) return;
    done_channels_ = channels_;
    left_ = {sums + a.first * 2 * side, a.to, a.count};
    left_next_ = {sums + block_sums / 2 + b.first * 2 * side, b.to, pair ? b.count : 0};
    pairs_left_ = ceil_div(left_.count, int64_t{2}) + ceil_div(left_next_.count, int64_t{2});
  }

  const Product& p_;
  const PackedLayout& l_;
  const TilePlan& plan_;
  const TileRoom room_;
  const TileFinish finish_;
  int64_t height_ = 0, tiles_ = 0;
  // The column.
  Channels* channels_ = nullptr;
  const uint8_t* packed_[2] = {};
  bool two_ = false;
  Bytes zero_[2];
  const uint8_t *ahead_ = nullptr, *ahead_end_ = nullptr;
  int64_t ahead_lines_ = 0;
  // Rows of the block before that are not finished yet: of one tile and of the next, and how many pairs they make.
  struct Left {
    const int32_t* sums;
    int64_t to, count;
  };
  const Channels* done_channels_;
  Left left_{}, left_next_{};
  int64_t pairs_left_ = 0;
};

template <int B, bool codes, bool added>
void multiply_tiles(const Product& p) {
  const PackedLayout& l = p.layout;
  const TilePlan plan = plan_tiles(p, thread_count());
  const TileFinish finish(p.epilogue, p.out, p.n);
  int64_t bytes = 0;
  const auto take = [&](int64_t size, int64_t count) {
    const int64_t at = bytes;
    bytes += round_up(size * count, 64);
    return at;
  };
  const int64_t rows_bytes = plan.block_rows * p.source.row_bytes + p.source.fixed_bytes + 64;
  const int64_t pieces = take(sizeof(Piece), p.source.piece_count), runs = take(sizeof(Run), plan.block_rows);
  const int64_t rows = take(1, rows_bytes), tiles = take(sizeof(TileRows), plan.block_rows);
  // At worst all tiles are copied, with rows that two of them share, and a tile reads behind the last.
  const int64_t copies = take(l.k_padded, 2 * plan.block_rows + side), steps = take(8, 3 * plan.steps);
  const int64_t unpacked = take(1, B < 8 ? 2 * l.k_padded * side : 0);
  // The pair of an odd last row reads one more.
  const int64_t sums = take(4, (stretches(plan.steps) > 1 ? plan.block_rows : 2) * block_sums + 2 * side);
  const int64_t channels = take(sizeof(Channels), 2);
  parallel_for(plan.workers, 1, [&](int64_t begin, int64_t end) {
    uint8_t* const memory = static_cast<uint8_t*>(thread_scratch(bytes));
    int64_t* const step = reinterpret_cast<int64_t*>(memory + steps);
    const TileRoom room{reinterpret_cast<Piece*>(memory + pieces),
                        reinterpret_cast<Run*>(memory + runs),
                        memory + rows,
                        rows_bytes,
                        reinterpret_cast<TileRows*>(memory + tiles),
                        memory + copies,
                        step,
                        step + plan.steps,
                        step + 2 * plan.steps,
                        memory + unpacked,
                        reinterpret_cast<int32_t*>(memory + sums),
                        reinterpret_cast<Channels*>(memory + channels)};
    p.source.pieces(p.source.self, room.pieces);
    TileState state;
    TileWorker<B, codes, added> worker(p, plan, room, finish);
    int64_t loaded = -1;
    for (int64_t unit = plan.units * begin / plan.workers; unit < plan.units * end / plan.workers; ++unit) {
      const int64_t at = unit / plan.columns, outer = at / plan.row_blocks;
      const int64_t first = at % plan.row_blocks * plan.block_rows;
      if (loaded != at) worker.load_rows(state, outer, first, least(plan.block_rows, p.rows - first));
      loaded = at;
      worker.column(outer, unit % plan.columns);
    }
    worker.flush();
    state.release();
  });
}

// Does what it can do: tiles of weights are read in their order, so the pieces must be whole segments, in one group of
// K. A few rows would leave the tiles empty.
inline bool multiply_on_tiles(const Product& p) {
  const PackedLayout& l = p.layout;
  if (l.k_groups > 1 || p.rows < few_rows || p.source.piece_count != l.segments) return false;
  Piece* const pieces = static_cast<Piece*>(thread_scratch(l.segments * static_cast<int64_t>(sizeof(Piece))));
  p.source.pieces(p.source.self, pieces);
  for (int64_t i = 0; i < l.segments; ++i)
    if (pieces[i].k != i * l.segment_padded || pieces[i].n != l.segment_k) return false;
  with_flags(p.epilogue.out_step, p.epilogue.residual && p.epilogue.residual_step, [&](auto codes, auto added) {
    switch (l.stored_bits) {
      case 2: return multiply_tiles<2, codes, added>(p);
      case 4: return multiply_tiles<4, codes, added>(p);
      default: return multiply_tiles<8, codes, added>(p);
    }
  });
  return true;
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
