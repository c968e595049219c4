// What a register tile is given: `rows` rows of x times `blocks` blocks of 16 output channels, along pieces of K.
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
//  - Weights below 8 bits: the first of several tiles of a column unpacks them and keeps code - zero as int8 for the
//    others. A tile that is alone (Worker::zeros_behind) multiplies the codes from 0: zero * (sum of the row's codes)
//    is too much in the sum, which Terms::value (finish.h) takes away. Where tile_moves, x and its zero are 128 less
//    for it, so x is signed.
//  - Where words_of_8_bits is set (dot.h), 8-bit weights are multiplied as 16-bit words: x and the distances between
//    its rows and pieces are those of words then, and the first tile keeps words.
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

// The width that a tile is told: where it makes no difference, one for all.
template <int width>
constexpr int tile_width = width_matters ? width : 8;
// Bytes for each weight that the first tile of a column keeps.
template <int B>
constexpr int kept_bytes = B == 8 && words_of_8_bits ? 2 : 1;

struct TileArgs {
  const uint8_t* x;  // of the first row
  int64_t x_stride;
  const Piece* pieces;
  int64_t piece_count;
  const uint8_t* weight;  // of the first block, padded position 0 of K
  int64_t weight_pitch;   // bytes from block to block
  const uint8_t* zeros;   // [16] of the first block, and of its other groups of K; for weights that are kept
  int64_t zeros_pitch;    // from block to block
  uint8_t* kept;          // where a tile that unpacks stores int8 weights of the first block, from position 0 on
  int64_t kept_pitch;
  int32_t* acc;           // [rows][blocks * 16], written if there is one group of K
  const uint32_t* start;  // [blocks * 16]: what those sums start with, if tile_starts
  // With several groups of K: the pieces of each, and the values of their sums are added to y [rows][blocks * 16].
  int64_t k_groups, group_pieces;
  Terms terms;
  float* y;
  // What is needed after this column of tiles: one line of it is fetched into L2 with each vector. Any address will do.
  const uint8_t* ahead;
  bool hurry;  // three lines with each two steps, not one: few tiles stand before the next column
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
