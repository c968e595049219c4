// Tiles of registers (AMX): TDPBUSD adds to 16 x 16 sums the products of 16 rows of 64 codes with 64 codes of int8
// weights of 16 channels, 16,384 products in 16 cycles, in exact int32. The driver is amx_igemm.h.
//
// What was measured on Sapphire Rapids, in cycles: a product takes as long as A has rows (9 at least); loading a tile 8
// from L1 and 23 from L2, storing one 16, all beside the products, as long as enough of them lie in the window of the
// out-of-order machine. TILEZERO does not run beside them: sums begin with a load of one line, sixteen times. While
// products run, float vectors have one port instead of two: an epilogue is cheap only between products, not behind
// them.
#pragma once
#include "cpu/dot.h"
#include "cpu/finish.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t tile_k = 64, tile_bytes = 1024;  // a tile B: 64 codes of K of 16 channels
constexpr int side = 16;

// gcc's own intrinsics tell the compiler nothing about the memory that a load reads.
template <int tile>
QK_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(p), "r"(stride) : "memory");
}
template <int tile>
QK_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
QK_INLINE void products() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Tiles 0 .. 3: sums; 4, 5: rows of x; 6, 7: weights. Other libraries of the process have their own configuration, so
// each body of a parallel loop sets ours and leaves none behind.
class TileState {
 public:
  // Rows of x in a tile: 1 .. 16. Forgets what is in the tiles.
  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : side);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // At the end; not a destructor, which would need tables for exceptions in code that throws none.
  void release() { asm volatile("tilerelease"); }

 private:
  int64_t rows_ = 0;
};

// A tile of rows of x, `stride` bytes apart. Copied ones lie step by step, not as the pieces say. From row `first` of
// it on, `count` rows are rows `to` and following of the product; others belong to the tile before, or to none.
struct TileRows {
  const uint8_t* x;
  int64_t stride;
  bool copied;
  int64_t first, count, to;
};

// What two blocks of 16 channels share. Channels that are not there have step 0.
struct alignas(64) Channels {
  int32_t start[2 * side];  // where the sums begin: -x_zero * sums, or 0 with zeros of rows
  int32_t sums[2 * side];
  float step[2 * side], bias[2 * side];
  uint32_t there;  // a bit for each channel
  int64_t first;   // output channel
  bool careful;    // a result may be NaN or beyond int32
  bool plain;      // neither that, nor a residual of floats, nor steps of rows
};

// Epilogue of 32 channels at a time, in the arithmetic of finish.h; made once for a call.
class TileFinish {
 public:
  TileFinish(const Epilogue& e, void* out, int64_t n)
      : e_(e),
        out_(out),
        n_(n),
        codes_(e.out_step != nullptr),
        low_(e.activation == Activation::none ? -__builtin_inff() : 0.0f),
        high_(e.activation == Activation::relu6 ? 6.0f : __builtin_inff()) {
    if (!codes_) return;
    limits_ = code_limits(e);
    top_ = static_cast<float>(top_code(e.out_bits) - limits_.zero);
  }

  // Steps, bias and sums of the channels from ch.first on that ch.there names; sums: of their blocks. No bias is -0,
  // which leaves every sum alone.
  void load(Channels& ch, const uint8_t* sums, int64_t blocks, int64_t k) const {
    __m512 worst_step = _mm512_setzero_ps(), worst_bias = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int i = 0; i < 2; ++i) {
      const __mmask16 there = static_cast<__mmask16>(ch.there >> (i * side));
      const int64_t first = ch.first + i * side;
      __m512 step = _mm512_maskz_loadu_ps(there, e_.weight_step + first), bias = _mm512_set1_ps(-0.0f);
      if (e_.bias) bias = _mm512_mask_loadu_ps(bias, there, e_.bias + first);
      const __m512i sum = i < blocks ? _mm512_loadu_si512(sums + i * side * 4) : _mm512_setzero_si512();
      __m512i start = _mm512_setzero_si512();
      if (!e_.per_row) {
        step = _mm512_mul_ps(step, _mm512_set1_ps(*e_.x_step));
        start = _mm512_sub_epi32(start, _mm512_mullo_epi32(sum, _mm512_set1_epi32(*e_.x_zero)));
      }
      _mm512_store_ps(ch.step + i * side, step);
      _mm512_store_ps(ch.bias + i * side, bias);
      _mm512_store_si512(ch.sums + i * side, sum);
      _mm512_store_si512(ch.start + i * side, start);
      nan |= _mm512_cmp_ps_mask(step, bias, _CMP_UNORD_Q);
      worst_step = _mm512_max_ps(worst_step, _mm512_abs_ps(step));
      worst_bias = _mm512_max_ps(worst_bias, _mm512_abs_ps(bias));
    }
    float worst =
        static_cast<float>(k) * (255.0f * 128.0f) * _mm512_reduce_max_ps(worst_step) + _mm512_reduce_max_ps(worst_bias);
    if (e_.residual) worst += e_.residual_step ? 256.0f * *e_.residual_step : __builtin_inff();
    ch.careful = nan || e_.per_row || !(worst * limits_.inverse < 1e9f);
    ch.plain = !(codes_ && ch.careful) && !e_.per_row && (!e_.residual || e_.residual_step);
  }

  // What results of the same channels share, in registers. added: a residual of codes.
  struct Constants {
    __m512 step[2], bias[2], inverse, low, high, added_step;
    __m512i added_zero;
    CodeVectors limits;
    uint32_t there;
  };
  template <bool added>
  QK_INLINE Constants constants(const Channels& ch) const {
    const auto both = [](const float* p, int i) { return _mm512_load_ps(p + i * side); };
    return {{both(ch.step, 0), both(ch.step, 1)},
            {both(ch.bias, 0), both(ch.bias, 1)},
            _mm512_set1_ps(limits_.inverse),
            _mm512_set1_ps(low_),
            _mm512_set1_ps(high_),
            added ? _mm512_set1_ps(*e_.residual_step) : _mm512_setzero_ps(),
            added ? _mm512_set1_epi32(*e_.residual_zero) : _mm512_setzero_si512(),
            CodeVectors(limits_),
            ch.there};
  }

  // Two neighbouring rows of a block's sums, or one, go to `row` of the product and to the next.
  template <bool codes, bool added>
  QK_INLINE void pair(const int32_t* sums, const Channels& ch, const Constants& c, int64_t row, bool two) const {
    if (!ch.plain) return special_pair<codes, added>(sums, ch, row, two);
    const int64_t at = row * n_ + ch.first, at_next = two ? at + n_ : at;
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      y[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + i * side)), c.step[i % 2]),
                           c.bias[i % 2]);
    if constexpr (added) add_codes(y, c, at, at_next);
    write<codes>(y, c, at, at_next, two);
  }

 private:
  // Limits, codes and their place; y: two vectors of a row and two of the next.
  template <bool codes>
  QK_INLINE void write(__m512* y, const Constants& c, int64_t at, int64_t at_next, bool two) const {
    if constexpr (!codes) {
      float* const out = static_cast<float*>(out_);
      const __mmask16 there[2] = {static_cast<__mmask16>(c.there), static_cast<__mmask16>(c.there >> 16)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) y[i] = _mm512_min_ps(c.high, _mm512_max_ps(c.low, y[i]));  // NaN passes
      _mm512_mask_storeu_ps(out + at, there[0], y[0]);
      _mm512_mask_storeu_ps(out + at + side, there[1], y[1]);
      if (two) {
        _mm512_mask_storeu_ps(out + at_next, there[0], y[2]);
        _mm512_mask_storeu_ps(out + at_next + side, there[1], y[3]);
      }
    } else {
      uint8_t* const out = static_cast<uint8_t*>(out_);
      __m512i q[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(y[i], c.inverse));  // ties to even
      const __m512i u = transposed(narrowed(q, 4, c.limits));
      _mm256_mask_storeu_epi8(out + at, c.there, _mm512_castsi512_si256(u));
      if (two) _mm256_mask_storeu_epi8(out + at_next, c.there, _mm512_extracti64x4_epi64(u, 1));
    }
  }

  // The same with all that is not the rule: rows have their own steps, a residual of floats is added, values may be NaN
  // or leave int32.
  template <bool codes, bool added>
  __attribute__((noinline)) void special_pair(const int32_t* sums, const Channels& ch, int64_t row, bool two) const {
    const int64_t next = two ? row + 1 : row;
    Constants c = constants<added>(ch);
    __m512 y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i acc = _mm512_load_si512(sums + i * side);
      __m512 step = c.step[i % 2];
      if (e_.per_row) {
        const int64_t r = i < 2 ? row : next;
        acc = _mm512_sub_epi32(
            acc, _mm512_mullo_epi32(_mm512_load_si512(ch.sums + i % 2 * side), _mm512_set1_epi32(e_.x_zero[r])));
        step = _mm512_mul_ps(step, _mm512_set1_ps(e_.x_step[r]));
      }
      y[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), step), c.bias[i % 2]);
    }
    const int64_t at = row * n_ + ch.first, at_next = next * n_ + ch.first;
    if constexpr (added)
      add_codes(y, c, at, at_next);
    else if (e_.residual)
      add_floats(y, c, at, at_next);
    if (codes && ch.careful) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 t = _mm512_mul_ps(y[i], c.inverse);
        const __mmask16 number = _mm512_cmp_ps_mask(t, t, _CMP_ORD_Q);
        y[i] = _mm512_min_ps(_mm512_maskz_mov_ps(number, t), _mm512_set1_ps(top_));
      }
      c.inverse = _mm512_set1_ps(1.0f);  // exact
    }
    write<codes>(y, c, at, at_next, two);
  }

  QK_INLINE void add_codes(__m512* y, const Constants& c, int64_t at, int64_t at_next) const {
    const uint8_t* const from = static_cast<const uint8_t*>(e_.residual);
    const __m256i u[2] = {_mm256_maskz_loadu_epi8(c.there, from + at),
                          _mm256_maskz_loadu_epi8(c.there, from + at_next)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i half = i % 2 ? _mm256_extracti128_si256(u[i / 2], 1) : _mm256_castsi256_si128(u[i / 2]);
      const __m512i units = _mm512_sub_epi32(_mm512_cvtepu8_epi32(half), c.added_zero);
      y[i] = _mm512_add_ps(y[i], _mm512_mul_ps(_mm512_cvtepi32_ps(units), c.added_step));
    }
  }

  QK_INLINE void add_floats(__m512* y, const Constants& c, int64_t at, int64_t at_next) const {
    const __mmask16 there[2] = {static_cast<__mmask16>(c.there), static_cast<__mmask16>(c.there >> 16)};
    const float* const from = static_cast<const float*>(e_.residual);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      y[i] = _mm512_add_ps(y[i], _mm512_maskz_loadu_ps(there[i % 2], from + (i < 2 ? at : at_next) + i % 2 * side));
  }

  const Epilogue e_;
  void* const out_;
  const int64_t n_;
  const bool codes_;
  const float low_, high_;
  float top_ = 0.0f;
  CodeLimits limits_{};
};

// 64 codes of K of 16 channels: u - zero, and 0 behind the first n.
template <int B>
QK_INLINE void unpack_tile(const uint8_t* packed, Bytes zero, int64_t n, uint8_t* out) {
  constexpr int parts = 8 / B;
  if (n >= tile_k) {
#pragma GCC unroll 16
    for (int v = 0; v < 16 / parts; ++v) {
      const Bytes raw = load64(packed + v * 64);
#pragma GCC unroll 4
      for (int p = 0; p < parts; ++p) store64(out + (v * parts + p) * 64, minus(unpack<B>(raw, p), zero));
    }
    return;
  }
  for (int v = 0; v < 16; ++v) {
    const int64_t there = least<int64_t>(4, most<int64_t>(0, n - 4 * v));
    const __mmask64 mask = 0x1111111111111111ull * ((1u << there) - 1);
    const Bytes raw = load64(packed + v / parts * 64);
    const Bytes codes = _mm512_and_si512(_mm512_srlv_epi16(raw, _mm512_set1_epi16(static_cast<short>(v % parts * B))),
                                         _mm512_set1_epi8((1 << B) - 1));
    store64(out + v * 64, _mm512_maskz_sub_epi8(mask, codes, zero));
  }
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
