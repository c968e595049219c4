// Rows of packed codes with their numbers (ops/embedding_bag.h), decoded a vector at a time.
#pragma once
#include <cstring>

#include "cpu/lanes.h"
#include "ops/embedding_bag.h"

namespace qk::cpu::QK_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef int32_t Integers __attribute__((vector_size(4 * lanes)));

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourWords __attribute__((vector_size(16)));

// Exact. The product brings the exponent's bias from 15 to 127, for denormals too.
QK_INLINE Four from_half(FourWords half) {
  const FourWords rest = (half & 0x7fff) << 13;
  const FourWords odd = reinterpret_cast<FourWords>(rest >= 0x0f800000) & 0x7f800000;  // Inf, NaN
  return reinterpret_cast<Four>(reinterpret_cast<FourWords>(reinterpret_cast<Four>(rest) * 0x1p112f) |
                                (half & 0x8000) << 16 | odd);
}

// Of two bytes each, which is not float32.
QK_INLINE Four from_two_bytes(FloatType dtype, FourWords words) {
  return dtype == FloatType::float16 ? from_half(words) : reinterpret_cast<Four>(words << 16);
}

// Four numbers of a dtype.
QK_INLINE Four read_four(FloatType dtype, const uint8_t* p) {
  if (dtype == FloatType::float32) {
    Four values;
    std::memcpy(&values, p, sizeof values);
    return values;
  }
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
#if defined(__AVX512BW__)
  if (dtype == FloatType::float16)
    return _mm512_castps512_ps128(
        _mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(halves)))));
#elif defined(__F16C__)
  if (dtype == FloatType::float16) return _mm_cvtph_ps(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(halves)));
#endif
  return from_two_bytes(dtype, __builtin_convertvector(halves, FourWords));
}

struct Affine {
  Lane scale, offset;
};

// Each is loaded into all lanes from where it lies: numbers that pass through memory as a vector wait for their stores.
QK_INLINE Affine read_affine(FloatType dtype, const uint8_t* p) {
  if (dtype == FloatType::float32) {
    float scale, offset;
    std::memcpy(&scale, p, 4);
    std::memcpy(&offset, p + 4, 4);
    return {all_lanes(scale), all_lanes(offset)};
  }
  uint32_t both;
  std::memcpy(&both, p, 4);
#if defined(__AVX512BW__)
  if (dtype == FloatType::float16) {
    const Lane pairs = _mm512_cvtph_ps(_mm256_set1_epi32(static_cast<int32_t>(both)));
    return {_mm512_moveldup_ps(pairs), _mm512_movehdup_ps(pairs)};
  }
#elif defined(__F16C__)
  if (dtype == FloatType::float16) {
    const Lane pairs = _mm256_cvtph_ps(_mm_set1_epi32(static_cast<int32_t>(both)));
    return {_mm256_moveldup_ps(pairs), _mm256_movehdup_ps(pairs)};
  }
#endif
  const Four numbers = from_two_bytes(dtype, FourWords{both & 0xffff, both >> 16, 0, 0});
  return {all_lanes(numbers[0]), all_lanes(numbers[1])};
}

// What a code of a row stands for, computed for each: for 8 bits, and where a table of 16 entries takes longer.
template <bool weighted>
struct Scaled {
  Affine row;
  float weight;
  QK_INLINE Lane of(Lane codes) const {
    const Lane value = codes * row.scale + row.offset;
    return weighted ? value * weight : value;
  }
  QK_INLINE Lane at(Words codes) const {
    return of(__builtin_convertvector(reinterpret_cast<Integers>(codes & 15), Lane));
  }
  QK_INLINE void weigh(float w) { weight = w; }
  QK_INLINE bool read(const EmbeddingBagArgs& a, const uint8_t* p) {
    row = read_affine(a.dtype, p);
    return true;
  }
};

// The same, looked up: a table whose entries are the definition's values, weighted or not.
template <int bits>
struct Table {
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
  QK_INLINE void set_affine(const Affine& row) {
#if defined(__AVX512BW__)
    const Lane codes = bits == 2 ? Lane{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}
                                 : Lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    table = codes * row.scale + row.offset;
#elif defined(__AVX2__)
    const Lane codes = bits == 2 ? Lane{0, 1, 2, 3, 0, 1, 2, 3} : Lane{0, 1, 2, 3, 4, 5, 6, 7};
    table[0] = codes * row.scale + row.offset;
    if (bits == 4) table[1] = (codes + 8.0f) * row.scale + row.offset;
#else
    for (int i = 0; i < entries; ++i) table[i] = static_cast<float>(i) * row.scale[0] + row.offset[0];
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
      set_affine(read_affine(a.dtype, p));
      return true;
    }
    if (a.kind == RowKind::codebook) {
      float book[16];
      const int64_t size = a.dtype == FloatType::float32 ? 4 : 2;
      for (int i = 0; i < entries; i += 4) {
        const Four some = read_four(a.dtype, p + i * size);
        std::memcpy(book + i, &some, sizeof some);
      }
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

#if defined(__AVX512BW__)
template <bool upper>
QK_INLINE Lane interleaved(Lane a, Lane b) {
  if constexpr (upper)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  else
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
#elif defined(__AVX2__)
template <bool upper>
QK_INLINE Lane interleaved(Lane a, Lane b) {
  if constexpr (upper)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
#else
template <bool upper>
QK_INLINE Lane interleaved(Lane a, Lane b) {
  if constexpr (upper)
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
#endif

// The first n of accs * lanes columns.
template <int accs>
QK_INLINE void store_columns(const Lane (&values)[accs], float* out, int64_t n) {
  if (n == accs * lanes) {
#pragma GCC unroll 16
    for (int j = 0; j < accs; ++j) std::memcpy(out + j * lanes, &values[j], sizeof(Lane));
  } else {
    float some[accs * lanes];
#pragma GCC unroll 16
    for (int j = 0; j < accs; ++j) std::memcpy(some + j * lanes, &values[j], sizeof(Lane));
    std::memcpy(out, some, static_cast<size_t>(n) * 4);
  }
}

// The codes of accs * lanes columns. Each lane of a vector of words holds codes of its own, which are shifted down one
// after the other, whole bytes by loading from further on; where a vector has more lanes than there are words, these
// are repeated, and each copy starts with codes of its own; where there are more accumulators than a word has codes,
// they take several vectors of words. So accumulator j holds columns that lie apart.
template <int bits, int accs>
class RowPart {
  static constexpr int per_word = 32 / bits, each = least(accs, per_word);  // accumulators of a vector of words
  static constexpr int vectors = accs / each, copies = per_word / each, words = lanes / copies;

 public:
  static constexpr int64_t bytes = 4 * words * vectors + (copies == 1 ? 3 : 0);  // that are read

  QK_INLINE explicit RowPart(const uint8_t* codes) : codes_(codes) {
    if constexpr (copies > 1) {
      Words shift{};
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) shift[lane] = static_cast<uint32_t>(lane / words * each * bits);
      words_ = repeated(codes) >> shift;
    }
  }
  template <class Numbers>
  QK_INLINE Lane at(const Numbers& numbers, int j) const {
    if constexpr (copies > 1) return numbers.at(words_ >> (j * bits));
    const int in_word = j % each * bits;
    Words from_byte;
    std::memcpy(&from_byte, codes_ + j / each * 4 * words + in_word / 8, sizeof from_byte);
    return numbers.at(from_byte >> (in_word % 8));
  }

  QK_INLINE static void store(const Lane (&acc)[accs], float* out, int64_t n) {
#pragma GCC unroll 2
    for (int i = 0; i < vectors; ++i) {
      const int begin = i * each * lanes;
      store_vector(acc + i * each, out + begin, least<int64_t>(each * lanes, n - begin));
    }
  }

 private:
  // Each round interleaves the first half of the vectors with the second; after log2(each) of them the columns of a
  // lane lie together. Then the copies of a word.
  QK_INLINE static void store_vector(const Lane* acc, float* out, int64_t n) {
    Lane v[each], w[each];
#pragma GCC unroll 16
    for (int j = 0; j < each; ++j) v[j] = acc[j];
#pragma GCC unroll 4
    for (int left = each; left > 1; left /= 2) {
#pragma GCC unroll 8
      for (int j = 0; j < each / 2; ++j) {
        w[2 * j] = interleaved<false>(v[j], v[j + each / 2]);
        w[2 * j + 1] = interleaved<true>(v[j], v[j + each / 2]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < each; ++j) v[j] = w[j];
    }
    if constexpr (copies == 1) {
      store_columns<each>(v, out, n);
    } else {
      float mixed[each * lanes], sorted[each * lanes];
      store_columns<each>(v, mixed, each * lanes);
      float* to = n == each * lanes ? out : sorted;
      for (int word = 0; word < words; ++word)
        for (int copy = 0; copy < copies; ++copy)
          std::memcpy(to + (word * copies + copy) * each, mixed + (copy * words + word) * each, 4 * each);
      if (to == sorted) std::memcpy(out, sorted, static_cast<size_t>(n) * 4);
    }
  }

  QK_INLINE static Words repeated(const uint8_t* codes) {
#if defined(__AVX512BW__)
    if constexpr (copies == 2)
      return reinterpret_cast<Words>(
          _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))));
    if constexpr (copies == 4)
      return reinterpret_cast<Words>(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#endif
    Words all;
    for (int copy = 0; copy < copies; ++copy)
      std::memcpy(reinterpret_cast<char*>(&all) + copy * 4 * words, codes, 4 * words);
    return all;
  }

  const uint8_t* codes_;
  Words words_{};
};

template <int accs>
class RowPart<8, accs> {
 public:
  static constexpr int64_t bytes = accs * lanes;
  QK_INLINE explicit RowPart(const uint8_t* codes) : codes_(codes) {}
  template <bool weighted>
  QK_INLINE Lane at(const Scaled<weighted>& numbers, int j) const {
    return numbers.of(floats_of(codes_ + j * lanes));
  }
  QK_INLINE static void store(const Lane (&acc)[accs], float* out, int64_t n) { store_columns<accs>(acc, out, n); }

 private:
  const uint8_t* codes_;
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
