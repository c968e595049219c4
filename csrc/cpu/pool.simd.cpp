#include "ops/pool.h"

#include "cpu/values.h"

namespace qk::cpu::QK_ISA {
namespace {

// The positions of a window along one axis that lie inside of x.
struct Span {
  int64_t first, count, padded;  // padded: with those in the padding that torch counts
};

Span span_of(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t size) {
  const int64_t begin = at * stride - pad;
  const int64_t skip = begin < 0 ? (-begin + dilation - 1) / dilation : 0;
  const int64_t end = begin < size ? least(kernel, (size - begin + dilation - 1) / dilation) : 0;
  return {begin + skip * dilation, most<int64_t>(0, end - skip), least(kernel, size + pad - begin)};
}

// --- max ---

#if defined(__AVX512BW__)
typedef __m512i Bytes;
QK_INLINE Bytes larger(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
#elif defined(__AVX2__)
typedef __m256i Bytes;
QK_INLINE Bytes larger(Bytes a, Bytes b) { return _mm256_max_epu8(a, b); }
#else
typedef uint8_t Bytes __attribute__((vector_size(16)));
QK_INLINE Bytes larger(Bytes a, Bytes b) { return a > b ? a : b; }
#endif
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
#if defined(__AVX2__)
QK_INLINE Bytes16 larger(Bytes16 a, Bytes16 b) {
  return reinterpret_cast<Bytes16>(_mm_max_epu8(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
#endif
QK_INLINE uint8_t larger(uint8_t a, uint8_t b) { return a > b ? a : b; }

// The largest of a window for every channel, a vector at a time. The last vector may overlap the one before.
template <class Vector, int fixed_cols>
QK_INLINE void max_window(const uint8_t* x, int64_t rows, int64_t any_cols, int64_t row_step, int64_t col_step,
                          int64_t channels, uint8_t* out) {
  const int64_t cols = fixed_cols ? fixed_cols : any_cols;
  constexpr int64_t width = sizeof(Vector);
  for (int64_t c = 0; c < channels; c += width) {
    c = least(c, channels - width);
    Vector most_so_far{};
    const uint8_t* row = x + c;
    for (int64_t i = 0; i < rows; ++i, row += row_step) {
      const uint8_t* at = row;
      for (int64_t j = 0; j < cols; ++j, at += col_step) {
        Vector v;
        std::memcpy(&v, at, sizeof v);
        most_so_far = larger(most_so_far, v);
      }
    }
    std::memcpy(out + c, &most_so_far, sizeof most_so_far);
  }
}

template <class Vector>
void max_row(const PoolArgs& args, const uint8_t* image, int64_t oy, uint8_t* out) {
  const PoolArgs a = args;  // a copy stays in registers
  const Span rows = span_of(oy, a.kernel_h, a.stride_h, a.pad_h, a.dilation_h, a.h);
  for (int64_t ox = 0; ox < a.ow; ++ox, out += a.channels) {
    const Span cols = span_of(ox, a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, a.w);
    const uint8_t* x = image + (rows.first * a.w + cols.first) * a.channels;
    const int64_t row_step = a.dilation_h * a.w * a.channels, col_step = a.dilation_w * a.channels;
    if (cols.count == 3)
      max_window<Vector, 3>(x, rows.count, 3, row_step, col_step, a.channels, out);
    else if (cols.count == 2)
      max_window<Vector, 2>(x, rows.count, 2, row_step, col_step, a.channels, out);
    else
      max_window<Vector, 0>(x, rows.count, cols.count, row_step, col_step, a.channels, out);
  }
}

// --- average ---

// Codes, words and sums of a strip of channels: the compiler widens such vectors value by value (gcc 12), so by name.
#if defined(__AVX512BW__)
typedef __m512i Words;
QK_INLINE Words words_of(const uint8_t* codes) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}
QK_INLINE Words added(Words a, Words b) { return _mm512_add_epi16(a, b); }
QK_INLINE __m512i sums_of(Words words, int half) {
  return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words));
}
#elif defined(__AVX2__)
typedef __m256i Words;
QK_INLINE Words words_of(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
QK_INLINE Words added(Words a, Words b) { return _mm256_add_epi16(a, b); }
QK_INLINE __m256i sums_of(Words words, int half) {
  return _mm256_cvtepu16_epi32(half ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words));
}
#else
typedef uint16_t Words __attribute__((vector_size(16)));
typedef int32_t FourSums __attribute__((vector_size(16)));
QK_INLINE Words words_of(const uint8_t* codes) {
  Words words;
  for (int i = 0; i < 8; ++i) words[i] = codes[i];
  return words;
}
QK_INLINE Words added(Words a, Words b) { return a + b; }
QK_INLINE FourSums sums_of(Words words, int half) {
  FourSums sums;
  for (int i = 0; i < 4; ++i) sums[i] = words[4 * half + i];
  return sums;
}
#endif
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef float Floats __attribute__((vector_size(4 * lanes)));

// Sums of a strip of channels: 16 bits for as many codes as they hold, then 32.
class Sums {
 public:
  static constexpr int64_t most_codes = 257;  // 257 * 255 < 2^16

  QK_INLINE void add(const uint8_t* codes) {
    first_ = added(first_, words_of(codes));
    second_ = added(second_, words_of(codes + 2 * lanes));
  }
  QK_INLINE void flush() {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums_[i] += reinterpret_cast<Ints>(sums_of(i < 2 ? first_ : second_, i % 2));
    first_ = second_ = Words{};
  }
  // float(sum - correction) * factor
  QK_INLINE Values values(int32_t correction, float factor) const {
    Values y;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      y.v[i] = reinterpret_cast<Lane>(__builtin_convertvector(sums_[i] - correction, Floats)) * factor;
    return y;
  }

 private:
  Words first_{}, second_{};
  Ints sums_[4]{};
};

// `some`: fewer channels than a strip, read one at a time.
template <bool some>
QK_INLINE Values average(const uint8_t* x, const Span& rows, const Span& cols, int64_t row_step, int64_t channels,
                         int32_t correction, float factor) {
  Sums sums;
  int64_t room = Sums::most_codes;
  for (int64_t i = 0; i < rows.count; ++i) {
    const uint8_t* at = x + i * row_step;
    for (int64_t left = cols.count; left > 0;) {
      const int64_t now = least(left, room);
      for (int64_t j = 0; j < now; ++j, at += channels) {
        if constexpr (some) {
          uint8_t codes[strip] = {};
          for (int64_t c = 0; c < channels; ++c) codes[c] = at[c];
          sums.add(codes);
        } else {
          sums.add(at);
        }
      }
      left -= now;
      room -= now;
      if (room == 0) {
        sums.flush();
        room = Sums::most_codes;
      }
    }
  }
  sums.flush();
  return sums.values(correction, factor);
}

template <bool codes, bool tame>
void average_row(const PoolArgs& args, const Sink& shared, const uint8_t* image, int64_t oy, int64_t out) {
  const PoolArgs a = args;  // copies stay in registers
  const Sink sink = shared;
  const Span rows = span_of(oy, a.kernel_h, a.stride_h, a.pad_h, 1, a.h);
  const float step = *a.x.step;
  for (int64_t ox = 0; ox < a.ow; ++ox, out += a.channels) {
    const Span cols = span_of(ox, a.kernel_w, a.stride_w, a.pad_w, 1, a.w);
    const int64_t inside = rows.count * cols.count;
    const int64_t count = a.divisor ? a.divisor : a.count_padding ? rows.padded * cols.padded : inside;
    const float factor = step / static_cast<float>(count);
    const int32_t correction = static_cast<int32_t>(inside) * *a.x.zero;
    const uint8_t* x = image + (rows.first * a.w + cols.first) * a.channels;
    if (a.channels < strip) {
      float buffer[strip];
      sink.write<codes, tame>(average<true>(x, rows, cols, a.w * a.channels, a.channels, correction, factor), buffer,
                              0);
      copy_out<codes>(buffer, a.out.data, out, a.channels);
      continue;
    }
    for (int64_t c = 0; c < a.channels; c += strip) {
      c = least(c, a.channels - strip);
      sink.write<codes, tame>(average<false>(x + c, rows, cols, a.w * a.channels, a.channels, correction, factor),
                              a.out.data, out + c);
    }
  }
}

template <class F>
void each_out_row(const PoolArgs& a, const F& f) {
  const int64_t work = most<int64_t>(1, a.ow * a.channels * most(a.stride_h * a.stride_w, least(a.kernel_h, a.h)));
  parallel_for(a.images * a.oh, most<int64_t>(1, grain_values / work), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job)
      f(static_cast<const uint8_t*>(a.x.data) + job / a.oh * a.h * a.w * a.channels, job % a.oh,
        job * a.ow * a.channels);
  });
}

template <class Vector>
void max_pool(const PoolArgs& a) {
  each_out_row(a, [&](const uint8_t* image, int64_t oy, int64_t out) {
    max_row<Vector>(a, image, oy, static_cast<uint8_t*>(a.out.data) + out);
  });
}

}  // namespace

void pool(const PoolArgs& a) {
  if (a.channels == 0) return;  // no memory either
  if (a.mode == PoolMode::max) {
    if (a.channels >= static_cast<int64_t>(sizeof(Bytes))) return max_pool<Bytes>(a);
    if (a.channels >= 16) return max_pool<Bytes16>(a);
    return max_pool<uint8_t>(a);
  }
  const float window = static_cast<float>(least(a.kernel_h, a.h)) * static_cast<float>(least(a.kernel_w, a.w));
  const Sink sink(a.out, Source(a.x).largest * window);
  with_result(a.out, sink, [&](auto codes, auto tame) {
    each_out_row(
        a, [&](const uint8_t* image, int64_t oy, int64_t out) { average_row<codes, tame>(a, sink, image, oy, out); });
  });
}

}  // namespace qk::cpu::QK_ISA
