// The register tile: `rows` rows of a panel times `blocks` blocks of 16 output channels, a stretch of K.
#pragma once
#include "cpu/panel.h"

namespace qk::cpu::QK_ISA {
namespace {

struct TileArgs {
  const uint8_t* panel;
  const uint8_t* weight;  // at the start of K of the first block
  int64_t weight_pitch;   // bytes from block to block
  const uint8_t* zeros;   // [16] of the first block; only with unpacking
  int64_t zeros_pitch;
  int64_t k_begin, k_end;  // padded K, whole vectors
  int32_t* acc;            // [rows][blocks * 16]
  // What is needed after this column of tiles: one line of it is fetched into L2 with each vector.
  const uint8_t* ahead;
};

// B: stored width; below 8 the weights are unpacked in registers. Every loop over the sums is unrolled: else gcc keeps
// them in memory.
template <int B, int rows, int blocks, bool small>
void tile(const TileArgs& a) {
  constexpr int parts = 8 / B;
  // Few rows: more sets of sums, so that one product need not wait for the one before.
  constexpr int sets = rows * blocks >= 8 ? 1 : rows * blocks >= 4 ? 2 : 4;
  constexpr int unroll = sets > parts ? sets / parts : 1;
  Lanes acc[sets][rows][blocks];
  Bytes zero[blocks];
#pragma GCC unroll 4
  for (int s = 0; s < sets; ++s)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) acc[s][r][c] = none();
  if constexpr (B < 8) {
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) zero[c] = spread16(a.zeros + c * a.zeros_pitch);
  }
  const auto vector = [&](const uint8_t* x, const uint8_t* w, int first) __attribute__((always_inline)) {
    Bytes raw[blocks];
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) raw[c] = load64(w + c * a.weight_pitch);
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      Bytes weights[blocks];
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) {
        if constexpr (B < 8) {
          weights[c] = unpack<B>(raw[c], p, zero[c]);
        } else {
          weights[c] = raw[c];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Four codes = broadcast4(x + r * chunk + 4 * p);
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c)
          acc[(first + p) % sets][r][c] = dot4<small>(acc[(first + p) % sets][r][c], codes, weights[c]);
      }
    }
  };
  constexpr int64_t per_vector = 4 * parts;  // codes of K
  for (int64_t k = a.k_begin; k < a.k_end;) {
    const int64_t stop = least(a.k_end, k / chunk * chunk + chunk);
    const uint8_t* x = a.panel + k / chunk * chunk_pitch + k % chunk;
    const uint8_t* w = a.weight + k / per_vector * 64;
    const uint8_t* ahead = a.ahead + k / per_vector * 64;
    for (; k + unroll * per_vector <= stop; k += unroll * per_vector, x += unroll * per_vector, w += unroll * 64) {
      if constexpr (unroll == 1) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += 64;
      }
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) vector(x + u * per_vector, w + u * 64, u * parts);
    }
    if constexpr (unroll > 1)
      for (; k < stop; k += per_vector, x += per_vector, w += 64) vector(x, w, 0);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) {
      Lanes total = acc[0][r][c];
#pragma GCC unroll 4
      for (int s = 1; s < sets; ++s) total = sum(total, acc[s][r][c]);
      store(a.acc + (r * blocks + c) * 16, total);
    }
}

using Tile = void (*)(const TileArgs&);

// The tile for `rows` rows (1 .. tile_rows, or tile_rows_unpacking), which may compute a few rows too many: a panel is
// whole, and nobody reads the sums of rows that are not there.
template <int B, bool small>
Tile tile_for(int64_t rows, int64_t blocks) {
#if defined(QK_ISA_AVX512VNNI)
  if (blocks == 1) {
    if (rows <= 1) return tile<B, 1, 1, small>;
    if (rows <= 4) return tile<B, 4, 1, small>;
    if (rows <= 8) return tile<B, 8, 1, small>;
    if constexpr (B == 8) return tile<B, 14, 1, small>;
    return nullptr;
  }
  if constexpr (B == 8) {
    if (rows > 12) return tile<B, 14, 2, small>;
    if (rows > 10) return tile<B, 12, 2, small>;
    if (rows > 8) return tile<B, 10, 2, small>;
  }
  if (rows > 6) return tile<B, 8, 2, small>;
  if (rows > 4) return tile<B, 6, 2, small>;
  if (rows > 2) return tile<B, 4, 2, small>;
  return rows == 2 ? tile<B, 2, 2, small> : tile<B, 1, 2, small>;
#else
  if (rows > 2) return tile<B, 4, 1, small>;
  return rows == 2 ? tile<B, 2, 1, small> : tile<B, 1, 1, small>;
#endif
}

// int8 weights in place of packed ones, for a column of tiles that many panels will read.
template <int B>
void unpack_weights(const uint8_t* weight, const uint8_t* zeros, const PackedLayout& layout, uint8_t* out) {
  const int64_t vectors = layout.group_padded / (4 * (8 / B));
  for (int64_t g = 0; g < layout.k_groups; ++g) {
    const Bytes zero = spread16(zeros + g * 16);
    for (int64_t v = 0; v < vectors; ++v, weight += 64) {
      const Bytes raw = load64(weight);
#pragma GCC unroll 4
      for (int p = 0; p < 8 / B; ++p, out += 64) store64(out, unpack<B>(raw, p, zero));
    }
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
