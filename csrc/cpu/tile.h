// The register tile: `rows` rows of x times `blocks` blocks of 16 output channels, along pieces of K.
//
// How a kernel states its product (gemm, conv2d), and what another micro kernel (AMX) reads:
//  - A run is a number of neighbouring rows of the product (pixels of an image's row) that lie x_stride bytes apart.
//    A tile takes up to tile_rows of them, from one run; x is read where it lies. A convolution makes a padded copy of
//    the image's rows, and pixel ox of a row begins ox * stride_w * channels bytes behind the first one.
//  - A piece is a stretch of K that a row holds without a gap: n codes at byte x of the row against the weights from
//    padded position k on (core/layout.h). A gemm has one for each group of K; a convolution one for each row of the
//    kernel, of kw * c codes (dilation_w 1, one group), or one for each tap, of c codes.
//  - Kernels go along n in steps of 4. The codes behind the last one meet weights that are 0 bytes, so their value does
//    not matter, but they must be memory of ours: the caller's x is read in place only if n % 4 = 0.
//    AMX goes in steps of 64 with a shorter last tile; k is a multiple of 64 for such pieces, and 64 codes of int8
//    weights (8 bits, or unpacked) are 1,024 bytes in a row: one tile B, blocks weight_pitch apart.
//  - Weights below 8 bits are multiplied as codes from 0: zero * (sum of the row's codes) is too much in the sum, which
//    Terms::value (finish.h) takes away. The first tile of a column unpacks them and keeps them as int8 for the others.
//  - With one group of K the sums go to acc, [rows][blocks * 16] int32; Worker::write (igemm.simd.cpp) takes them from
//    there. With several, the tile itself adds Terms::value of each group to y, of the same shape.
#pragma once
#include "core/layout.h"
#include "cpu/finish.h"

namespace qk::cpu::QK_ISA {

struct Piece {
  int64_t x, k, n;
};

namespace {

struct TileArgs {
  const uint8_t* x;  // of the first row
  int64_t x_stride;
  const Piece* pieces;
  int64_t piece_count;
  const uint8_t* weight;  // of the first block, padded position 0 of K
  int64_t weight_pitch;   // bytes from block to block
  uint8_t* kept;          // where a tile that unpacks stores int8 weights of the first block, from position 0 on
  int64_t kept_pitch;
  int32_t* acc;  // [rows][blocks * 16], written if there is one group of K
  // With several groups of K: the pieces of each, and the values of their sums are added to y [rows][blocks * 16].
  int64_t k_groups, group_pieces;
  Terms terms;
  float* y;
  // What is needed after this column of tiles: one line of it is fetched into L2 with each vector. Any address will do.
  const uint8_t* ahead;
  bool hurry;  // three lines with each two steps, not one: few tiles stand before the next column
};

// B: stored width; below 8 the codes are unpacked in registers and, with `keep`, also stored for the tiles that follow.
// small: int8 weights of at most 64, which AVX2 multiplies faster.
// Every loop over the sums is unrolled: else gcc keeps them in memory. Each load beside the products costs them a slot
// now and then, so a tile of 9 x 3 (12 loads for 27 products) is faster than one of 14 x 2 (16 for 28).
template <int B, bool keep, bool small, int rows, int blocks>
void tile(const TileArgs& a) {
  constexpr int parts = 8 / B;
  constexpr int64_t per_vector = 4 * parts;  // codes of K
  // Few rows: more sets of sums, so that one product need not wait for the one before.
  constexpr int sets = rows * blocks >= 8 ? 1 : rows * blocks >= 4 ? 2 : 4;
  constexpr int unroll = sets > parts ? sets / parts : parts > 1 ? 1 : 2;
  static_assert(unroll * parts % sets == 0, "every set gets its turn in each round");
  // Few rows wait for the weights, more for the units that multiply.
  constexpr int64_t fetch = rows <= 4 && blocks > 1 ? 24 : 0;
  Lanes acc[sets][rows][blocks];
  const auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int s = 0; s < sets; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c) acc[s][r][c] = none();
  };
  // use(r, c, sum)
  const auto each_sum = [&](const auto& use) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) {
        Lanes total = acc[0][r][c];
#pragma GCC unroll 4
        for (int s = 1; s < sets; ++s) total = sum(total, acc[s][r][c]);
        use(r, c, total);
      }
  };
  clear();
  const int64_t x_stride = a.x_stride, weight_pitch = a.weight_pitch, kept_pitch = a.kept_pitch;
  const auto vector = [&](const uint8_t* x, const uint8_t* w, uint8_t* kept, int first,
                          int steps) __attribute__((always_inline)) {
    if constexpr (fetch > 0) {
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) __builtin_prefetch(w + c * weight_pitch + fetch * 64, 0, 3);
    }
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      if (p >= steps) break;
      Bytes weights[blocks];
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) {
        weights[c] = load64(w + c * weight_pitch);
        if constexpr (B < 8) weights[c] = unpack<B>(weights[c], p);
        if constexpr (keep) store64(kept + c * kept_pitch + p * 64, weights[c]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Four codes = broadcast4(x + r * x_stride + 4 * p);
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c)
          acc[(first + p) % sets][r][c] = dot4<small>(acc[(first + p) % sets][r][c], codes, weights[c]);
      }
    }
  };
  const uint8_t* ahead = a.ahead;
  const bool hurry = a.hurry;
  const auto along = [&](const Piece& piece) __attribute__((always_inline)) {
    const uint8_t* x = a.x + piece.x;
    const uint8_t* w = a.weight + piece.k / per_vector * 64;
    uint8_t* kept = keep ? a.kept + piece.k * 16 : nullptr;
    int64_t k = round_up(piece.n, 4);
    for (; k >= unroll * per_vector; k -= unroll * per_vector, x += unroll * per_vector, w += unroll * 64) {
      if constexpr (fetch == 0) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += 64;
        if (hurry) {
          __builtin_prefetch(ahead, 0, 2);
          __builtin_prefetch(ahead + 64, 0, 2);
          ahead += 128;
        }
      }
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) vector(x + u * per_vector, w + u * 64, kept + u * parts * 64, u * parts, parts);
      if constexpr (keep) kept += unroll * parts * 64;
    }
    if constexpr (unroll > 1)
      for (; k >= per_vector; k -= per_vector, x += per_vector, w += 64, kept += keep ? parts * 64 : 0)
        vector(x, w, kept, 0, parts);
    if constexpr (parts > 1) {
      if (k > 0) vector(x, w, kept, 0, static_cast<int>(k / 4));
    }
  };
  const int64_t group_pieces = a.group_pieces;
  for (int64_t i = 0, g = 0; i < a.piece_count; ++i) {
    along(a.pieces[i]);
    if (i + 1 < (g + 1) * group_pieces || a.k_groups == 1) continue;
    const auto add_to_y = [&](auto per_row, auto zeros) __attribute__((always_inline)) {
      each_sum([&](int r, int c, const Lanes& total) __attribute__((always_inline)) {
        float* y = a.y + (r * blocks + c) * 16;
        const Floats value = a.terms.template value<per_row, zeros>(words(total), g, c, r);
        store_some(y, load<Floats>(y) + value, block);
      });
    };
    with_flags(a.terms.row_step, a.terms.zeros, add_to_y);
    clear();
    ++g;
  }
  if (a.k_groups == 1)
    each_sum([&](int r, int c, const Lanes& total)
                 __attribute__((always_inline)) { store(a.acc + (r * blocks + c) * 16, total); });
}

using Tile = void (*)(const TileArgs&);

// The tile for exactly `rows` and `blocks`, within the limits.
template <int B, bool keep, bool small, int blocks, int rows>
Tile tile_of(int64_t n) {
  if constexpr (rows > 1) {
    if (n < rows) return tile_of<B, keep, small, blocks, rows - 1>(n);
  }
  return tile<B, keep, small, rows, blocks>;
}
template <int B, bool keep, bool small>
Tile tile_for(int64_t rows, int64_t blocks) {
  if constexpr (most_blocks > 1) {
    if (blocks == 2) return tile_of<B, keep, small, 2, tile_limits.rows>(rows);
    if (blocks == 3) return tile_of<B, keep, small, 3, tile_limits.rows>(rows);
    if (blocks == 4) return tile_of<B, keep, small, 4, tile_limits.few_rows>(rows);
  }
  return tile_of<B, keep, small, 1, tile_limits.rows>(rows);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
