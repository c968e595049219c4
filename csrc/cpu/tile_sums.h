// The register tile of all instruction sets but AVX2: 32-bit sums in registers along all of K (tile_args.h).
#pragma once
#include "cpu/tile_args.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr bool tile_starts = true, tile_moves = true;

template <bool moved>
QK_INLINE Lanes product(Lanes acc, Four x, Bytes w) {
  return moved ? dot4_moved(acc, x, w) : dot4<false>(acc, x, w);
}

// B: stored width; below 8 the codes are unpacked in registers and, with `keep`, stored without their zeros for the
// tiles that follow. Without, they are unsigned and x is moved, so that few rows can multiply them where they lie in
// their byte: 2^(p * B) times too large, in sums of their own. Every loop over the sums is unrolled: else gcc keeps
// them in memory. Each load beside the products costs them a slot now and then, so a tile of 9 x 3 (12 loads for 27
// products) is faster than one of 14 x 2 (16 for 28).
template <int B, bool keep, int width, int rows, int blocks>
void tile(const TileArgs& a) {
  constexpr int parts = 8 / B;
  constexpr int64_t per_vector = 4 * parts;  // codes of K
  constexpr bool moved = B < 8 && !keep, high = moved && rows * blocks * parts <= 24;
  // Few rows: more sets of sums, so that one product need not wait for the one before.
  constexpr int in_turn = rows * blocks >= 8 ? 1 : rows * blocks >= 4 ? 2 : 4;
  constexpr int sets = high ? most(parts, in_turn) : in_turn;
  // Steps of the loop: the counting beside many products costs them slots.
  constexpr int unroll = sets > parts ? sets / parts : parts > 1 ? 1 : rows * blocks >= 16 ? 4 : 2;
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
        for (int s = 1; s < sets; ++s) total = sum(total, high ? shifted(acc[s][r][c], s % parts * B) : acc[s][r][c]);
        use(r, c, total);
      }
  };
  clear();
  if (a.k_groups == 1) {
#pragma GCC unroll 4
    for (int c = 0; c < blocks; ++c) {
      const Lanes start = load<Lanes>(a.start + c * 16);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) acc[0][r][c] = start;
    }
  }
  Bytes zeros[blocks];
  const auto load_zeros = [&](int64_t g) __attribute__((always_inline)) {
    if constexpr (keep) {
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) zeros[c] = spread16(a.zeros + c * a.zeros_pitch + g * 16);
    }
  };
  load_zeros(0);
  const int64_t x_stride = a.x_stride, weight_pitch = a.weight_pitch, kept_pitch = a.kept_pitch;
  const uint8_t* const turn = a.weight + weight_pitch - fetch * 64;  // from here on the next column is fetched
  // rest: codes of the last step, if it is not whole and its weights are kept; else 0.
  const auto vector = [&](const uint8_t* x, const uint8_t* w, uint8_t* kept, int first, int steps,
                          int rest) __attribute__((always_inline)) {
    if constexpr (fetch > 0) {
      const uint8_t* const next = w + fetch * 64 + (w < turn ? 0 : (blocks - 1) * weight_pitch);
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) __builtin_prefetch(next + c * weight_pitch, 0, 3);
    }
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p) {
      if (p >= steps) break;
      Bytes weights[blocks];
#pragma GCC unroll 4
      for (int c = 0; c < blocks; ++c) {
        weights[c] = load64(w + c * weight_pitch);
        if constexpr (B < 8) weights[c] = high ? unpack_high<B>(weights[c], p) : unpack<B>(weights[c], p);
        if constexpr (keep) {
          weights[c] = minus(weights[c], zeros[c]);
          if (rest > 0 && p + 1 == steps) weights[c] = first_bytes(weights[c], rest);
          store64(kept + c * kept_pitch + p * 64, weights[c]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Four codes = broadcast4(x + r * x_stride + 4 * p);
#pragma GCC unroll 4
        for (int c = 0; c < blocks; ++c)
          acc[(first + p) % sets][r][c] = product<moved>(acc[(first + p) % sets][r][c], codes, weights[c]);
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
    // The vector of a last step that is not whole comes last.
    const int rest = keep ? static_cast<int>(piece.n % 4) : 0;
    const int64_t last = rest > 0 ? (k - 1) % per_vector + 1 : 0;
    k -= last;
    const uint8_t* const stop = w + k / (unroll * per_vector) * (unroll * 64);
    k %= unroll * per_vector;
    for (; w != stop; x += unroll * per_vector, w += unroll * 64) {
      if constexpr (fetch == 0) {
        constexpr int lines = unroll > 2 ? unroll / 2 : 1;
#pragma GCC unroll 4
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
        ahead += lines * 64;
        if (hurry) {
#pragma GCC unroll 4
          for (int i = 0; i < 2 * lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
          ahead += 2 * lines * 64;
        }
      }
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u)
        vector(x + u * per_vector, w + u * 64, kept + u * parts * 64, u * parts, parts, 0);
      if constexpr (keep) kept += unroll * parts * 64;
    }
    if constexpr (unroll > 1)
      for (; k >= per_vector; k -= per_vector, x += per_vector, w += 64, kept += keep ? parts * 64 : 0)
        vector(x, w, kept, 0, parts, 0);
    if constexpr (parts > 1) {
      if (k > 0) vector(x, w, kept, 0, static_cast<int>(k / 4), 0);
    }
    if (last > 0) vector(x, w, kept, 0, static_cast<int>(last / 4), rest);
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
    if (++g < a.k_groups) load_zeros(g);
  }
  if (a.k_groups == 1)
    each_sum([&](int r, int c, const Lanes& total)
                 __attribute__((always_inline)) { store(a.acc + (r * blocks + c) * 16, total); });
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
