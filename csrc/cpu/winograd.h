// Winograd's F(2 x 2, 3 x 3) in integers (docs/winograd.md): the transforms of input, weight and result, and the
// products between them. Positions are the 16 places of a 4 x 4 tile, row by row.
//   V, transformed input:   [groups of tiles][chunks][16 positions][rows][64 channels], uint8
//   U, transformed weights: [blocks][chunks][16 positions][16 steps][16 output channels x 4], int8
//   M, sums:                [16 positions][rows][blocks][16], int32
// A chunk is 64 channels. All that is written together lies together: sixteen streams in sixteen pages would miss the
// TLB. Planes are a line longer than a power of two, so that they do not share cache sets.
#pragma once
#include "core/layout.h"
#include "cpu/dot.h"
#include "cpu/finish.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx.h"
#endif

namespace qk::cpu::QK_ISA {
namespace winograd_parts {
namespace {

typedef uint8_t Vec __attribute__((vector_size(64)));
typedef uint16_t Pairs __attribute__((vector_size(64)));

constexpr int64_t line = 64, positions = 16, steps_per_chunk = 16;
constexpr int64_t u_plane = steps_per_chunk * line + line, u_chunk = positions * u_plane;
constexpr int64_t v_plane(int64_t rows) { return rows * line + line; }
constexpr int64_t v_chunk(int64_t rows) { return positions * v_plane(rows); }

QK_INLINE Vec get(const uint8_t* p) { return load<Vec>(p); }
QK_INLINE void put(uint8_t* p, const Vec& v) { std::memcpy(p, &v, sizeof v); }

// The first n of 64 bytes, 0 behind them; no byte behind them is read.
QK_INLINE Vec get_some(const uint8_t* p, int64_t n) {
#if defined(QK_ISA_AVX512VNNI)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, p));
#else
  uint8_t some[64] = {};
  std::memcpy(some, p, static_cast<size_t>(n));
  return get(some);
#endif
}

// --- input: V = B' d B. Differences lie within +-2 (2^6 - 1) and are stored with 128 added; the sum of sums at
// position (1, 1) has no sign. ---
template <class At>
QK_INLINE void input_tile(const At& at, uint8_t* v, int64_t plane) {
  Vec b[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec d0 = at(0, j), d1 = at(1, j), d2 = at(2, j), d3 = at(3, j);
    b[0][j] = d0 - d2, b[1][j] = d1 + d2, b[2][j] = d2 - d1, b[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec moved = b[i][2] + 128;  // modulo 256 adding and subtracting 128 are one
    uint8_t* to = v + 4 * i * plane;
    put(to, b[i][0] - moved);
    put(to + plane, i == 1 ? b[i][1] + b[i][2] : b[i][1] + moved);
    put(to + 2 * plane, moved - b[i][1]);
    put(to + 3 * plane, b[i][1] + 128 - b[i][3]);
  }
}

// --- weights: U = (2G) g (2G)', from packed codes [9 taps][64] a vector; B: their width ---
template <int B>
QK_INLINE Vec codes_of(const Vec& v, int part) {
  const Pairs moved = reinterpret_cast<Pairs>(v) >> (part * B);
  return reinterpret_cast<Vec>(moved) & static_cast<uint8_t>((1 << B) - 1);
}

struct WeightArgs {
  const uint8_t* codes;  // of a block
  const uint8_t* zeros;  // [16]
  uint8_t* u;
};

// All vectors of a block: 32 / B input channels each.
template <int B>
void transform_weights(const WeightArgs& a, int64_t vectors) {
  constexpr int parts = 8 / B;
  const Bytes spread = spread16(a.zeros);
  Vec zero;
  std::memcpy(&zero, &spread, sizeof zero);
  for (int64_t v = 0; v < vectors; ++v) {
    const uint8_t* codes = a.codes + v * 9 * line;
    const int64_t step = v * parts;
    uint8_t* u = a.u + step / steps_per_chunk * u_chunk + step % steps_per_chunk * line;
    Vec raw[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) raw[t] = get(codes + t * line);
#pragma GCC unroll 4
    for (int p = 0; p < parts; ++p, u += line) {
      Vec r[4][3];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const Vec g0 = codes_of<B>(raw[x], p) - zero, g1 = codes_of<B>(raw[3 + x], p) - zero;
        const Vec g2 = codes_of<B>(raw[6 + x], p) - zero, ends = g0 + g2;
        r[0][x] = g0 + g0, r[1][x] = ends + g1, r[2][x] = ends - g1, r[3][x] = g2 + g2;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec ends = r[i][0] + r[i][2];
        uint8_t* to = u + 4 * i * u_plane;
        put(to, r[i][0] + r[i][0]);
        put(to + u_plane, ends + r[i][1]);
        put(to + 2 * u_plane, ends - r[i][1]);
        put(to + 3 * u_plane, r[i][2] + r[i][2]);
      }
    }
  }
}

// --- products: at each position [rows tiles x channels] . [channels x 16 blocks] ---
struct ProductArgs {
  const uint8_t* v;
  const uint8_t* u;
  int64_t v_chunk;      // bytes from chunk to chunk
  int64_t u_block;      // and from block to block
  int64_t steps;        // of four channels
  const int32_t* init;  // [blocks][16]: what the sums start with
  int32_t* m;
};

// One position. Every loop over the sums is unrolled: else gcc keeps them in memory. pairs_fit: PackedHeader's, which
// AVX2 multiplies faster.
template <int rows, int blocks, bool pairs_fit>
void product(const ProductArgs& a) {
  Lanes acc[rows][blocks];
#pragma GCC unroll 4
  for (int b = 0; b < blocks; ++b) {
    const Lanes start = load<Lanes>(a.init + b * block);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r][b] = start;
  }
  const uint8_t* v = a.v;
  const uint8_t* u = a.u;
  const int64_t u_block = a.u_block;
  const auto step = [&](const uint8_t* x, const uint8_t* w) __attribute__((always_inline)) {
    Bytes weights[blocks];
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) weights[b] = load64(w + b * u_block);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Four codes = broadcast4(x + r * line);
#pragma GCC unroll 4
      for (int b = 0; b < blocks; ++b) acc[r][b] = dot4<pairs_fit>(acc[r][b], codes, weights[b]);
    }
  };
  constexpr int at_once = rows * blocks >= 16 ? 4 : 1;  // counting beside the products costs them slots
  for (int64_t steps = a.steps; steps > 0; steps -= steps_per_chunk, v += a.v_chunk, u += u_chunk) {
    const int64_t some = least(steps, steps_per_chunk);
    const uint8_t *x = v, *w = u;
    const uint8_t* const stop = u + some / at_once * at_once * line;
    for (; w != stop; x += at_once * 4, w += at_once * line)
#pragma GCC unroll 4
      for (int i = 0; i < at_once; ++i) step(x + i * 4, w + i * line);
    for (; w != u + some * line; x += 4, w += line) step(x, w);
  }
  int32_t* const m = a.m;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) store(m + (r * blocks + b) * block, acc[r][b]);
}

#if defined(QK_ISA_AMX)
// One position of one or two groups of sixteen tiles, v_group and m_group apart. Behind the last step U must be 0.
template <int groups, int blocks>
void tile_product(const ProductArgs& a, int64_t v_group, int64_t m_group) {
  load_tile<0>(a.init, 0);  // one line, sixteen times
  if constexpr (blocks == 2) load_tile<1>(a.init + block, 0);
  if constexpr (groups == 2) load_tile<2>(a.init, 0);
  if constexpr (groups == 2 && blocks == 2) load_tile<3>(a.init + block, 0);
  const uint8_t* v = a.v;
  const uint8_t* u = a.u;
  for (int64_t k = 0; k < a.steps; k += steps_per_chunk, v += a.v_chunk, u += u_chunk) {
    load_tile<6>(u, line);
    load_tile<4>(v, line);
    products<0, 4, 6>();
    if constexpr (blocks == 2) {
      load_tile<7>(u + a.u_block, line);
      products<1, 4, 7>();
    }
    if constexpr (groups == 2) {
      load_tile<5>(v + v_group, line);
      products<2, 5, 6>();
      if constexpr (blocks == 2) products<3, 5, 7>();
    }
  }
  constexpr int64_t pitch = blocks * line;
  store_tile<0>(a.m, pitch);
  if constexpr (blocks == 2) store_tile<1>(a.m + block, pitch);
  if constexpr (groups == 2) store_tile<2>(a.m + m_group, pitch);
  if constexpr (groups == 2 && blocks == 2) store_tile<3>(a.m + m_group + block, pitch);
}
#endif

using ProductOf = void (*)(const ProductArgs&);

// --- result: 4 Y = A' M A, then the epilogue ---
struct ResultArgs {
  const int32_t* m;
  int64_t m_plane, blocks;  // of M
  int64_t first, count;     // tiles
  int64_t across, down;     // tiles of an image
  int64_t oh, ow, n;
  int64_t n_first, n_valid;  // output channels
  float most_sum;            // |y| at most, before steps
  const Epilogue* epilogue;
  void* out;
};

template <class Finisher>
void result(const ResultArgs& a, const Finisher& f) {
  const Finisher finish = f;
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t n_first = a.n_first + b * block, valid = a.n_valid - b * block;
    const Floats nothing = {};
    const Floats steps = load_some<Floats>(a.epilogue->weight_step + n_first, valid) * *a.epilogue->x_step;
    // No bias is -0, which leaves every sum alone.
    const Floats bias = a.epilogue->bias ? load_some<Floats>(a.epilogue->bias + n_first, valid) : -nothing;
    bool tame = false;
    if constexpr (Finisher::by_units) tame = finish.tame(steps, bias, a.most_sum);
    int64_t tx = a.first % a.across, ty = a.first / a.across % a.down, image = a.first / a.across / a.down;
    const int32_t* m = a.m + b * block;
    const int64_t plane = a.m_plane, ow = a.ow, n = a.n;
    void* const out = a.out;
    for (int64_t t = 0; t < a.count; ++t, m += a.blocks * block) {
      Words z[4][2];  // M A
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Words x1 = load<Words>(m + (4 * i + 1) * plane), x2 = load<Words>(m + (4 * i + 2) * plane);
        z[i][0] = load<Words>(m + 4 * i * plane) + x1 + x2;
        z[i][1] = x1 - x2 - load<Words>(m + (4 * i + 3) * plane);
      }
      const int64_t at = ((image * a.oh + 2 * ty) * ow + 2 * tx) * n + n_first;
      const bool below = 2 * ty + 1 < a.oh, right = 2 * tx + 1 < ow;
      const Words four_y[4] = {z[0][0] + z[1][0] + z[2][0], z[0][1] + z[1][1] + z[2][1], z[1][0] - z[2][0] - z[3][0],
                               z[1][1] - z[2][1] - z[3][1]};
      const int64_t to[4] = {at, at + n, at + ow * n, at + ow * n + n};
      Words y[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) y[i] = reinterpret_cast<Words>(reinterpret_cast<Ints>(four_y[i]) >> 2);
      if (tame && below && right) {
        if constexpr (Finisher::by_units) finish.write_four(y, steps, bias, out, to, valid);
      } else {
        const bool there[4] = {true, right, below, right && below};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (there[i])
            finish.write(__builtin_convertvector(reinterpret_cast<Ints>(y[i]), Floats) * steps + bias, out, to[i],
                         valid);
      }
      if (++tx == a.across) {
        tx = 0;
        if (++ty == a.down) ty = 0, ++image;
      }
    }
  }
}

using ResultOf = void (*)(const ResultArgs&);

template <bool codes, Residual residual>
void result_with(const ResultArgs& a) {
  result(a, Finish<codes, residual>(*a.epilogue));
}

template <bool codes>
ResultOf result_for(const Epilogue& e) {
  if (!e.residual) return result_with<codes, Residual::none>;
  return e.residual_step ? result_with<codes, Residual::codes> : result_with<codes, Residual::floats>;
}

}  // namespace
}  // namespace winograd_parts
}  // namespace qk::cpu::QK_ISA
