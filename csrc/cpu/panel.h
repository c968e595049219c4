// A block of rows of x in the order in which the tiles read it: panels of tile_rows rows; in a panel K goes in chunks
// of 256 bytes, chunk by chunk all rows. So a tile finds every row at a constant distance from one pointer, and no two
// rows share a cache set whatever K is.
#pragma once
#include "core/layout.h"
#include "cpu/dot.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t chunk = 256;
constexpr int64_t chunk_pitch = chunk * tile_rows;

constexpr int64_t panel_bytes(int64_t k_padded) { return ceil_div(k_padded, chunk) * chunk_pitch; }

template <int n>
QK_INLINE void move_ends(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t length) {
  uint8_t head[n], tail[n];
  std::memcpy(head, from, n);
  std::memcpy(tail, from + length - n, n);
  std::memcpy(to, head, n);
  std::memcpy(to + length - n, tail, n);
}

// Short copies of any length; a call to memcpy costs more than most of them. The last piece overlaps the one before.
QK_INLINE void move(uint8_t* __restrict to, const uint8_t* __restrict from, int64_t n) {
  if (n >= 64) {
    for (int64_t i = 0; i + 64 < n; i += 64) std::memcpy(to + i, from + i, 64);
    std::memcpy(to + n - 64, from + n - 64, 64);
  } else if (n > 32) {
    move_ends<32>(to, from, n);
  } else if (n >= 16) {
    move_ends<16>(to, from, n);
  } else if (n >= 8) {
    move_ends<8>(to, from, n);
  } else if (n >= 4) {
    move_ends<4>(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Writes one row from left to right, skipping what is added to the groups of K.
class RowWriter {
 public:
  RowWriter(uint8_t* block_base, int64_t row, const PackedLayout& layout)
      : base_(block_base + row / tile_rows * panel_bytes(layout.k_padded) + row % tile_rows * chunk),
        left_(layout.group_k),
        group_k_(layout.group_k),
        gap_(layout.group_padded - layout.group_k) {}

  QK_INLINE void copy(const uint8_t* from, int64_t n) {
    while (n > 0) {
      const int64_t m = room(n);
      move(at(), from, m);
      from += m;
      n -= m;
      advance(m);
    }
  }
  QK_INLINE void fill(uint8_t code, int64_t n) {
    while (n > 0) {
      const int64_t m = room(n);
      std::memset(at(), code, static_cast<size_t>(m));
      n -= m;
      advance(m);
    }
  }

 private:
  uint8_t* at() const { return base_ + k_ / chunk * chunk_pitch + k_ % chunk; }
  int64_t room(int64_t n) const { return least(n, least(chunk - static_cast<int64_t>(k_ % chunk), left_)); }
  QK_INLINE void advance(int64_t n) {
    k_ += n;
    left_ -= n;
    if (left_ == 0) {
      k_ += gap_;
      left_ = group_k_;
    }
  }

  uint8_t* base_;
  uint64_t k_ = 0;  // unsigned: chunks are powers of two
  int64_t left_, group_k_, gap_;
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
