// From sums to results: the arithmetic of ops/epilogue.h for sixteen output channels at once.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/vectors.h"
#include "ops/epilogue.h"

namespace qk::cpu::QK_ISA {
namespace {

// float(acc - zero * sums) * step with step = x_step * weight_step. The difference wraps, as the exact one does that
// fits int32.
QK_INLINE Floats scaled(const Words& acc, const Words& zero_sums, const Floats& step) {
  return __builtin_convertvector(reinterpret_cast<Ints>(acc - zero_sums), Floats) * step;
}

// What zeros of weights below 8 bits add to the sums: zero * (sum of the row's codes). Terms of the 16 channels and of
// the row make one multiplication of 16-bit pairs, which holds sums below 2^26.
#if defined(QK_ISA_AVX512VNNI)
QK_INLINE Words zero_terms(const uint8_t* zeros) {
  const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  const __m512i low = _mm512_sub_epi32(_mm512_setzero_si512(), z);  // pair (-zero, -zero * 2048): 15 * 2048 < 2^15
  return reinterpret_cast<Words>(_mm512_mask_slli_epi16(low, 0xaaaaaaaa, _mm512_slli_epi32(low, 16), 11));
}
QK_INLINE int32_t row_term(int32_t sum) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum >> 11) << 16 | (static_cast<uint32_t>(sum) & 2047));
}
QK_INLINE Words less_zeros(const Words& acc, const Words& zeros, int32_t row) {
  return reinterpret_cast<Words>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(zeros), _mm512_set1_epi32(row)));
}
#else
QK_INLINE Words zero_terms(const uint8_t* zeros) { return __builtin_convertvector(load<Codes>(zeros), Words); }
QK_INLINE int32_t row_term(int32_t sum) { return sum; }
QK_INLINE Words less_zeros(const Words& acc, const Words& zeros, int32_t row) {
  return acc - zeros * static_cast<uint32_t>(row);
}
#endif

// From the sums of a tile to values, before the bias.
struct Terms {
  static constexpr int64_t pitch = most_blocks * block;  // of groups of K
  const float* steps;     // [k_groups][pitch]: weight_step, times x_step unless that comes by rows
  const uint32_t* sums;   // the same: sums of weights, times x_zero unless that comes by rows
  const uint32_t* zeros;  // the same: zero_terms, or null for weights of 8 bits
  // Of the tile's first row.
  const float* row_step;  // or null: the same for all rows
  const int32_t* row_zero;
  const int32_t* row_terms;  // [rows][k_groups], with zeros
  int64_t k_groups;

  // Row r of the tile, block c of the column, group g. with_zeros: weights below 8 bits.
  template <bool per_row, bool with_zeros>
  QK_INLINE Floats value(const Words& tile_sum, int64_t g, int64_t c, int64_t r) const {
    const int64_t at = g * pitch + c * block;
    Words acc = tile_sum;
    if constexpr (with_zeros) acc = less_zeros(acc, load<Words>(zeros + at), row_terms[r * k_groups + g]);
    Words zero_sums = load<Words>(sums + at);
    Floats step = load<Floats>(steps + at);
    if constexpr (per_row) {
      zero_sums = zero_sums * static_cast<uint32_t>(row_zero[r]);
      step = step * row_step[r];
    }
    return scaled(acc, zero_sums, step);
  }
};

// f(a, b) with constants.
template <class F>
QK_INLINE void with_flags(bool a, bool b, const F& f) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (a)
    b ? f(yes, yes) : f(yes, no);
  else
    b ? f(no, yes) : f(no, no);
}

enum class Residual { none, codes, floats };

// What a code is made of where results stay far inside int32: units (code - zero) are rounded first and limited as
// integers, by packing them with saturation. Rounding is monotone, so the order makes no difference.
struct CodeLimits {
  float inverse;  // of the step
  int32_t zero, low, high;
};

inline CodeLimits code_limits(const Epilogue& e) {
  CodeLimits l{};
  if (!e.out_step) return l;
  l.inverse = 1.0f / *e.out_step;
  l.zero = *e.out_zero;
  l.low = e.activation == Activation::none ? 0 : l.zero;
  l.high = static_cast<int32_t>(top_code(e.out_bits));
  const float six = 6.0f * l.inverse;
  if (e.activation == Activation::relu6 && six < 1024.0f)
    l.high = least(l.high, static_cast<int32_t>((six + 12582912.0f) - 12582912.0f) + l.zero);
  return l;
}

constexpr float far_units = 0x1p30f;  // below it in size, before rounding

#if defined(QK_ISA_AVX512VNNI)
struct CodeVectors {
  float inverse;
  __m512i zero, low, high;
  bool plain;  // saturation is all that is left to do
  QK_INLINE explicit CodeVectors(const CodeLimits& l)
      : inverse(l.inverse),
        zero(_mm512_set1_epi16(static_cast<int16_t>(l.zero))),
        low(_mm512_set1_epi8(static_cast<char>(l.low))),
        high(_mm512_set1_epi8(static_cast<char>(l.high))),
        plain(l.zero == 0 && l.low == 0 && l.high == 255) {}
};
// Units of n vectors, up to four -> codes; in lane L of 128 bits those of lane L of each vector.
QK_INLINE __m512i narrowed(const __m512i* v, int n, const CodeVectors& l) {
  __m512i a = _mm512_packs_epi32(v[0], v[n > 1 ? 1 : 0]);
  __m512i b = n > 2 ? _mm512_packs_epi32(v[2], v[n > 3 ? 3 : 2]) : a;
  if (l.plain) return _mm512_packus_epi16(a, b);
  a = _mm512_adds_epi16(a, l.zero), b = _mm512_adds_epi16(b, l.zero);
  return _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(a, b), l.low), l.high);
}
// A 4 x 4 matrix of 32 bits, row i in lane i of 128 bits; so the codes of each vector above come together.
QK_INLINE __m512i transposed(__m512i v) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
#endif

// What the results of a call share. Without an activation the limits are infinite: a comparison less to think of. For
// codes the limits are those of code - zero and of the activation, both divided by the step: rounding a product is
// monotone, so the smaller of two y gives the smaller of two y / step.
template <bool codes, Residual residual>
class Finish {
 public:
  explicit Finish(const Epilogue& e)
      : low_(e.activation == Activation::none ? -__builtin_inff() : 0.0f),
        high_(e.activation == Activation::relu6 ? 6.0f : __builtin_inff()),
        inverse_(codes ? 1.0f / *e.out_step : 0.0f),
        zero_(codes ? *e.out_zero : 0),
        limits_(code_limits(e)),
        added_(e.residual),
        added_step_(residual == Residual::codes ? *e.residual_step : 0.0f),
        added_zero_(residual == Residual::codes ? *e.residual_zero : 0) {
    if (!codes) return;
    low_ = most(e.activation == Activation::none ? low_ : 0.0f, static_cast<float>(-zero_));
    high_ = least(e.activation == Activation::relu6 ? 6.0f * inverse_ : high_,
                  static_cast<float>(top_code(e.out_bits) - zero_));
  }

#if defined(QK_ISA_AVX2)
  static constexpr bool by_units = codes && residual != Residual::floats;

  // Whether write_units is exact: |sum| <= most_sum for these channels. False if a step or a bias is not a number.
  QK_INLINE bool tame(const Floats& step, const Floats& bias, float most_sum) const {
    const Floats size = (step < 0 ? -step : step) * most_sum + (bias < 0 ? -bias : bias);
    const Floats far = (size + 255.0f * (added_step_ < 0 ? -added_step_ : added_step_)) * inverse_;
    const __m256 limit = _mm256_set1_ps(far_units);
    const __m256 all =
        _mm256_and_ps(_mm256_cmp_ps(half(far, 0), limit, _CMP_LT_OQ), _mm256_cmp_ps(half(far, 1), limit, _CMP_LT_OQ));
    return _mm256_movemask_ps(all) == 0xff;
  }

  // Rows of sums of sixteen channels, two at a time -> codes. zero_sums: taken from the sums.
  QK_INLINE void write_units(const int32_t* sums, int64_t rows, int64_t, const uint32_t* zero_sums, const float* steps,
                             const float* biases, void* out, int64_t at, int64_t n, int64_t valid) const {
    const __m256 inverse = _mm256_set1_ps(inverse_);
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(limits_.zero));
    const __m256i low = _mm256_set1_epi8(static_cast<char>(limits_.low));
    const __m256i high = _mm256_set1_epi8(static_cast<char>(limits_.high));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const auto words_of = [&](int64_t r) __attribute__((always_inline)) {
      __m256i units[2];
      Codes added{};
      if constexpr (residual == Residual::codes)
        added = load_some<Codes>(static_cast<const uint8_t*>(added_) + at + r * n, valid);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const auto eight = [&](const void* p) { return load32(static_cast<const uint8_t*>(p) + 32 * i); };
        const __m256i sum = _mm256_sub_epi32(eight(sums + r * block), eight(zero_sums));
        const __m256 step = _mm256_castsi256_ps(eight(steps)), bias = _mm256_castsi256_ps(eight(biases));
        __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), step), bias);
        if constexpr (residual == Residual::codes) {
          const __m128i u = reinterpret_cast<__m128i>(added);
          const __m256i eight_codes = _mm256_cvtepu8_epi32(i ? _mm_srli_si128(u, 8) : u);
          const __m256i difference = _mm256_sub_epi32(eight_codes, _mm256_set1_epi32(added_zero_));
          y = _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(difference), _mm256_set1_ps(added_step_)));
        }
        units[i] = _mm256_cvtps_epi32(_mm256_mul_ps(y, inverse));
      }
      return _mm256_adds_epi16(_mm256_packs_epi32(units[0], units[1]), zero);
    };
    for (int64_t r = 0; r < rows; r += 2) {
      const bool two = r + 1 < rows;
      const __m256i first = words_of(r);
      __m256i bytes = _mm256_packus_epi16(first, two ? words_of(r + 1) : first);
      bytes = _mm256_min_epu8(_mm256_max_epu8(bytes, low), high);
      bytes = _mm256_permutevar8x32_epi32(bytes, order);  // from lanes of 128 bits
      uint8_t* const to = static_cast<uint8_t*>(out) + at + r * n;
      store_some(to, reinterpret_cast<Codes>(_mm256_castsi256_si128(bytes)), valid);
      if (two) store_some(to + n, reinterpret_cast<Codes>(_mm256_extracti128_si256(bytes, 1)), valid);
    }
  }

  // Four vectors of sums of a block to four places.
  QK_INLINE void write_four(const Words* sums, const Floats& step, const Floats& bias, void* out, const int64_t* to,
                            int64_t valid) const {
    const Words zeros = {};
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2)
      write_units(reinterpret_cast<const int32_t*>(sums + i), 2, 1, reinterpret_cast<const uint32_t*>(&zeros),
                  reinterpret_cast<const float*>(&step), reinterpret_cast<const float*>(&bias), out, to[i],
                  to[i + 1] - to[i], valid);
  }
#elif defined(QK_ISA_AVX512VNNI)
  static constexpr bool by_units = codes && residual != Residual::floats;

  QK_INLINE bool tame(const Floats& step, const Floats& bias, float most_sum) const {
    const __m512 size = _mm512_abs_ps(step) * most_sum + _mm512_abs_ps(bias);
    const __m512 far = (size + 255.0f * (added_step_ < 0 ? -added_step_ : added_step_)) * inverse_;
    return _mm512_cmp_ps_mask(far, _mm512_set1_ps(far_units), _CMP_LT_OQ) == 0xffff;
  }

  // Rows of sums of `blocks` blocks, which started with what zero_sums would take from them. Four vectors are narrowed
  // together: of one row, or of two or four.
  QK_INLINE void write_units(const int32_t* sums, int64_t rows, int64_t blocks, const uint32_t*, const float* steps,
                             const float* biases, void* out, int64_t at, int64_t n, int64_t valid) const {
    const auto with = [&](auto count) __attribute__((always_inline)) {
      constexpr int each = count.value, at_once = each < 3 ? 4 / each : 1;
      const CodeVectors limits(limits_);
      __m512 step[each], bias[each];
#pragma GCC unroll 4
      for (int b = 0; b < each; ++b) {
        step[b] = _mm512_loadu_ps(steps + b * block);
        bias[b] = _mm512_loadu_ps(biases + b * block);
      }
      for (int64_t r = 0; r < rows; r += at_once) {
        __m512i q[4];
        int64_t to[at_once];
#pragma GCC unroll 4
        for (int i = 0; i < at_once * each; ++i) {
          const int64_t row = r + i / each;
          const int b = i % each;
          if (i >= each && row >= rows) {  // the first again
            q[i] = q[b], to[i / each] = to[0];
            continue;
          }
          to[i / each] = at + row * n;
          const __m512i sum = _mm512_loadu_si512(sums + (row * each + b) * block);
          q[i] = units_of(sum, step[b], bias[b], to[i / each] + b * block, valid - b * block);
        }
        store_lanes<each>(transposed(narrowed(q, each == 3 ? 3 : 4, limits)), out, to, valid);
      }
    };
    switch (blocks) {
      case 1: return with(std::integral_constant<int, 1>());
      case 2: return with(std::integral_constant<int, 2>());
      case 3: return with(std::integral_constant<int, 3>());
      default: return with(std::integral_constant<int, 4>());
    }
  }

  // Four vectors of sums of a block to four places.
  QK_INLINE void write_four(const Words* sums, const Floats& step, const Floats& bias, void* out, const int64_t* to,
                            int64_t valid) const {
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = units_of(reinterpret_cast<__m512i>(sums[i]), step, bias, to[i], valid);
    store_lanes<1>(transposed(narrowed(q, 4, CodeVectors(limits_))), out, to, valid);
  }
#else
  static constexpr bool by_units = false;
#endif

  // y with bias -> `valid` results from index `at` of out on. NaN passes the limits, as in torch; its code is the zero.
  QK_INLINE void write(const Floats& sum, void* out, int64_t at, int64_t valid) const {
    Floats y = sum;
    if constexpr (residual == Residual::codes) {
      const Codes u = load_some<Codes>(static_cast<const uint8_t*>(added_) + at, valid);
      y = y + __builtin_convertvector(integers(u) - added_zero_, Floats) * added_step_;
    }
    if constexpr (residual == Residual::floats)
      y = y + load_some<Floats>(static_cast<const float*>(added_) + at, valid);
    if constexpr (codes)
      store_some(static_cast<uint8_t*>(out) + at, code_of(y), valid);
    else
      store_some(static_cast<float*>(out) + at, limited(y), valid);
  }

 private:
#if defined(QK_ISA_AVX512VNNI)
  // Units of sixteen results; at: of the residual.
  QK_INLINE __m512i units_of(__m512i sum, const Floats& step, const Floats& bias, int64_t at, int64_t valid) const {
    Floats y = _mm512_cvtepi32_ps(sum) * step + bias;
    if constexpr (residual == Residual::codes) {
      const __m512i u = _mm512_cvtepu8_epi32(
          reinterpret_cast<__m128i>(load_some<Codes>(static_cast<const uint8_t*>(added_) + at, valid)));
      y = y + _mm512_cvtepi32_ps(_mm512_sub_epi32(u, _mm512_set1_epi32(added_zero_))) * added_step_;
    }
    return _mm512_cvtps_epi32(y * inverse_);  // ties to even
  }
  // Lane i of 128 bits is block i % blocks of row i / blocks.
  template <int blocks>
  static QK_INLINE void store_lanes(__m512i codes_of, void* out, const int64_t* to, int64_t valid) {
    uint8_t* const p = static_cast<uint8_t*>(out);
    const uint64_t there = valid >= 64 ? ~uint64_t{0} : (uint64_t{1} << valid) - 1;
    if constexpr (blocks >= 3) {
      _mm512_mask_storeu_epi8(p + to[0], blocks == 3 ? there & 0xffffffffffff : there, codes_of);
    } else if constexpr (blocks == 2) {
      _mm256_mask_storeu_epi8(p + to[0], static_cast<__mmask32>(there), _mm512_castsi512_si256(codes_of));
      _mm256_mask_storeu_epi8(p + to[1], static_cast<__mmask32>(there), _mm512_extracti64x4_epi64(codes_of, 1));
    } else {
      const __mmask16 some = static_cast<__mmask16>(there);
      _mm_mask_storeu_epi8(p + to[0], some, _mm512_castsi512_si128(codes_of));
      _mm_mask_storeu_epi8(p + to[1], some, _mm512_extracti32x4_epi32(codes_of, 1));
      _mm_mask_storeu_epi8(p + to[2], some, _mm512_extracti32x4_epi32(codes_of, 2));
      _mm_mask_storeu_epi8(p + to[3], some, _mm512_extracti32x4_epi32(codes_of, 3));
    }
  }
  // min and max give the second operand if one is NaN, or if both are zeros.
  QK_INLINE Floats limited(const Floats& y) const {
    return _mm512_min_ps(_mm512_set1_ps(high_), _mm512_max_ps(_mm512_set1_ps(low_), y));
  }
  QK_INLINE Codes code_of(const Floats& y) const {
    const __m512 t = y * inverse_;
    const __m512 number = _mm512_maskz_max_ps(_mm512_cmp_ps_mask(t, t, _CMP_ORD_Q), t, _mm512_set1_ps(low_));
    const __m512i units = _mm512_cvtps_epi32(_mm512_min_ps(number, _mm512_set1_ps(high_)));  // ties to even
    return reinterpret_cast<Codes>(_mm512_cvtepi32_epi8(_mm512_add_epi32(units, _mm512_set1_epi32(zero_))));
  }
#elif defined(QK_ISA_AVX2)
  // By halves of eight. min and max give the second operand if one is NaN, or if both are zeros.
  static QK_INLINE __m256 half(const Floats& y, int i) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(&y) + 8 * i);
  }
  QK_INLINE Floats limited(const Floats& y) const {
    const __m256 low = _mm256_set1_ps(low_), high = _mm256_set1_ps(high_);
    const __m256 both[2] = {_mm256_min_ps(high, _mm256_max_ps(low, half(y, 0))),
                            _mm256_min_ps(high, _mm256_max_ps(low, half(y, 1)))};
    return load<Floats>(both);
  }
  QK_INLINE __m256i units(__m256 y) const {
    const __m256 t = _mm256_mul_ps(y, _mm256_set1_ps(inverse_));
    const __m256 number = _mm256_and_ps(t, _mm256_cmp_ps(t, t, _CMP_ORD_Q));
    const __m256 within = _mm256_min_ps(_mm256_max_ps(number, _mm256_set1_ps(low_)), _mm256_set1_ps(high_));
    return _mm256_add_epi32(_mm256_cvtps_epi32(within), _mm256_set1_epi32(zero_));  // ties to even
  }
  QK_INLINE Codes code_of(const Floats& y) const {
    // The packs go by lanes of 128 bits: 0-3 8-11 | 4-7 12-15.
    const __m256i mixed = _mm256_packus_epi32(units(half(y, 0)), units(half(y, 1)));
    const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);
    return reinterpret_cast<Codes>(_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
#else
  QK_INLINE Floats limited(const Floats& sum) const {
    const Floats nothing = {}, low = nothing + low_, high = nothing + high_;
    const Floats y = sum < low ? low : sum;
    return y > high ? high : y;
  }
  QK_INLINE Codes code_of(const Floats& y) const {
    const Floats nothing = {}, bottom = nothing + low_, top = nothing + high_, magic = nothing + 12582912.0f;
    Floats t = y * inverse_;
    t = t == t ? t : nothing;
    t = t > bottom ? t : bottom;
    t = t < top ? t : top;
    return __builtin_convertvector(__builtin_convertvector((t + magic) - magic, Ints) + zero_, Codes);
  }
#endif

  float low_, high_, inverse_;
  int32_t zero_;
  CodeLimits limits_;
  const void* added_;
  float added_step_;
  int32_t added_zero_;
};

// body(finish) with the Finish of a call.
template <class Body>
void with_finish(const Epilogue& e, const Body& body) {
  const auto with = [&](auto codes) {
    if (!e.residual) return body(Finish<codes, Residual::none>(e));
    if (e.residual_step) return body(Finish<codes, Residual::codes>(e));
    return body(Finish<codes, Residual::floats>(e));
  };
  if (e.out_step) return with(std::true_type());
  return with(std::false_type());
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
