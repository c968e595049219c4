// Rows of x that are copied because they cannot be read in place: each segment of K (core/layout.h) filled up to whole
// steps of 4, rows an odd number of cache lines apart, so that no two share a cache set.
#pragma once
#include "cpu/tile.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t row_pitch(int64_t bytes) { return (ceil_div(bytes, 64) | 1) * 64; }
constexpr int64_t packed_row_pitch(const PackedLayout& l) { return row_pitch(round_up(l.segment_k, 4) * l.segments); }

// Piece i of rows that RowWriter made is segment i.
inline void packed_pieces(const PackedLayout& l, Piece* pieces) {
  for (int64_t s = 0; s < l.segments; ++s)
    pieces[s] = {s * round_up(l.segment_k, 4), s * l.segment_padded, l.segment_k};
}

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

// Writes one row from left to right, skipping what fills segments up.
class RowWriter {
 public:
  RowWriter(uint8_t* row, const PackedLayout& layout)
      : at_(row),
        left_(layout.segment_k),
        segment_k_(layout.segment_k),
        gap_(round_up(layout.segment_k, 4) - layout.segment_k) {}

  QK_INLINE void copy(const uint8_t* from, int64_t n) {
    while (n > 0) {
      const int64_t m = least(n, left_);
      move(at_, from, m);
      from += m;
      n -= m;
      advance(m);
    }
  }
  QK_INLINE void fill(uint8_t code, int64_t n) {
    while (n > 0) {
      const int64_t m = least(n, left_);
      std::memset(at_, code, static_cast<size_t>(m));
      n -= m;
      advance(m);
    }
  }

 private:
  QK_INLINE void advance(int64_t n) {
    at_ += n;
    left_ -= n;
    if (left_ == 0) {
      at_ += gap_;
      left_ = segment_k_;
    }
  }

  uint8_t* at_;
  int64_t left_, segment_k_, gap_;
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
