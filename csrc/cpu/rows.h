// Rows of packed codes with their numbers (ops/embedding_bag.h), decoded a vector at a time.
#pragma once
#include <cstring>

#include "cpu/simd.h"
#include "ops/embedding_bag.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: its own AVX-512 header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // such vectors never cross a call here: everything below is inlined

namespace qk::cpu::QK_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int lanes = 16;
typedef __m512 Lane;
QK_INLINE Lane larger(Lane a, Lane b) { return _mm512_max_ps(a, b); }  // b unless a > b
#elif defined(__AVX2__)
constexpr int lanes = 8;
typedef __m256 Lane;
QK_INLINE Lane larger(Lane a, Lane b) { return _mm256_max_ps(a, b); }
#else
constexpr int lanes = 4;
typedef float Lane __attribute__((vector_size(16)));
QK_INLINE Lane larger(Lane a, Lane b) { return a > b ? a : b; }
#endif
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint8_t Codes __attribute__((vector_size(lanes)));

// Exact. The product brings the exponent's bias from 15 to 127, for denormals too.
QK_INLINE float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &rest, 4);
  value *= 0x1p112f;
  uint32_t word;
  std::memcpy(&word, &value, 4);
  word |= sign | (rest >= 0x0f800000 ? 0x7f800000 : 0);
  std::memcpy(&value, &word, 4);
  return value;
}

QK_INLINE float read_number(RowDtype dtype, const uint8_t* p, int i) {
  if (dtype == RowDtype::float32) {
    float value;
    std::memcpy(&value, p + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, p + 2 * i, 2);
  if (dtype == RowDtype::float16) return from_half(half);
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// What a code of a row stands for: of 2 and 4 bits a table, whose entries are the definition's values, weighted or not.
template <int bits>
struct Numbers {
  static constexpr int entries = 1 << bits;
#if defined(__AVX512BW__)
  Lane table;
  QK_INLINE Lane at(Words codes) const {
    const __m512i index = reinterpret_cast<__m512i>(codes);
    return bits == 2 ? _mm512_permutevar_ps(table, index) : _mm512_permutexvar_ps(index, table);
  }
  QK_INLINE void weigh(float weight) { table = weight * table; }
#elif defined(__AVX2__)
  Lane table[2];
  QK_INLINE Lane at(Words codes) const {
    const __m256i index = reinterpret_cast<__m256i>(codes);
    if constexpr (bits == 2) return _mm256_permutevar_ps(table[0], index);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table[0], index), _mm256_permutevar8x32_ps(table[1], index),
                            reinterpret_cast<Lane>(codes << 28));
  }
  QK_INLINE void weigh(float weight) {
    table[0] = weight * table[0];
    table[1] = weight * table[1];
  }
#else
  float table[16];
  QK_INLINE Lane at(Words codes) const {
    const Words index = codes & (entries - 1);
    return Lane{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }
  QK_INLINE void weigh(float weight) {
    for (int i = 0; i < entries; ++i) table[i] = weight * table[i];
  }
#endif

  // code * scale + offset. A table of fewer entries than a vector has lanes repeats itself.
  QK_INLINE void set_affine(float scale, float offset) {
#if defined(__AVX512BW__)
    const Lane codes = bits == 2 ? Lane{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}
                                 : Lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    table = codes * scale + offset;
#elif defined(__AVX2__)
    const Lane codes = bits == 2 ? Lane{0, 1, 2, 3, 0, 1, 2, 3} : Lane{0, 1, 2, 3, 4, 5, 6, 7};
    table[0] = codes * scale + offset;
    table[1] = (codes + 8.0f) * scale + offset;
#else
    for (int i = 0; i < entries; ++i) table[i] = static_cast<float>(i) * scale + offset;
#endif
  }
  QK_INLINE void set_book(const float* book) {
    float all[16];
    for (int i = 0; i < 16; ++i) all[i] = book[i % entries];
    std::memcpy(&table, all, sizeof table < sizeof all ? sizeof table : sizeof all);
  }

  // False for the number of a book that there is not.
  QK_INLINE bool read(const EmbeddingBagArgs& a, const uint8_t* p) {
    if (__builtin_expect(a.kind == RowKind::affine, 1)) {
      set_affine(read_number(a.dtype, p, 0), read_number(a.dtype, p, 1));
      return true;
    }
    if (a.kind == RowKind::codebook) {
      float book[16];
      for (int i = 0; i < entries; ++i) book[i] = read_number(a.dtype, p, i);
      set_book(book);
      return true;
    }
    int32_t number;
    std::memcpy(&number, p, 4);
    if (number < 0 || number >= a.book_count) return false;
    set_book(a.books + int64_t{number} * entries);
    return true;
  }
};

template <>
struct Numbers<8> {
  float scale, offset, weight = 1.0f;
  QK_INLINE void weigh(float w) { weight = w; }
  QK_INLINE bool read(const EmbeddingBagArgs& a, const uint8_t* p) {
    scale = read_number(a.dtype, p, 0);
    offset = read_number(a.dtype, p, 1);
    return true;
  }
};

// The codes of accs * lanes columns. Each lane of a vector of words holds codes of its own, which are shifted down one
// after the other; where a vector has more lanes than there are words, these are repeated, and each copy starts with
// codes of its own. So accumulator j holds columns that lie apart: place(i) is where column i is.
template <int bits, int accs>
class RowPart {
  static constexpr int per_word = 32 / bits, copies = per_word / accs, words = lanes / copies;

 public:
  static constexpr int64_t bytes = 4 * words;

  QK_INLINE explicit RowPart(const uint8_t* codes) {
#if defined(__AVX512BW__)
    if constexpr (copies == 1) {
      std::memcpy(&words_, codes, 64);
    } else if constexpr (copies == 2) {
      words_ = reinterpret_cast<Words>(
          _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
    } else if constexpr (copies == 4) {
      words_ =
          reinterpret_cast<Words>(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
    } else {
      int64_t both;
      std::memcpy(&both, codes, 8);
      words_ = reinterpret_cast<Words>(_mm512_set1_epi64(both));
    }
#else
    for (int copy = 0; copy < copies; ++copy) std::memcpy(reinterpret_cast<char*>(&words_) + copy * bytes, codes, bytes);
#endif
    if constexpr (copies > 1) {
      Words shift;
      for (int lane = 0; lane < lanes; ++lane) shift[lane] = static_cast<uint32_t>(lane / words * accs * bits);
      words_ >>= shift;
    }
  }
  QK_INLINE Lane next(const Numbers<bits>& numbers, int j) const { return numbers.at(words_ >> (j * bits)); }

  static constexpr int64_t place(int64_t i) {
    const int64_t word = i / per_word, rest = i % per_word;
    return rest % accs * lanes + rest / accs * words + word;
  }

 private:
  Words words_;
};

template <int accs>
class RowPart<8, accs> {
 public:
  static constexpr int64_t bytes = accs * lanes;
  QK_INLINE explicit RowPart(const uint8_t* codes) : codes_(codes) {}
  QK_INLINE Lane next(const Numbers<8>& numbers, int j) const {
    Codes codes;
    std::memcpy(&codes, codes_ + j * lanes, sizeof codes);
    typedef float Floats __attribute__((vector_size(4 * lanes)));
    typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
    const Floats units = __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
    return (reinterpret_cast<Lane>(units) * numbers.scale + numbers.offset) * numbers.weight;
  }
  static constexpr int64_t place(int64_t i) { return i; }

 private:
  const uint8_t* codes_;
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
