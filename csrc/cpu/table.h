// Bytes through a table of 256 bytes.
#pragma once
#include <cstring>

#include "cpu/simd.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12: its own AVX-512 header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace qk::cpu::QK_ISA {
namespace {

#if defined(__AVX512VBMI__)

class Table {
 public:
  static constexpr int64_t width = 64;
  explicit Table(const uint8_t* table) { std::memcpy(part_, table, sizeof part_); }
  QK_INLINE __m512i at(__m512i codes) const {
    const __m512i low = _mm512_permutex2var_epi8(part_[0], codes, part_[1]);
    const __m512i high = _mm512_permutex2var_epi8(part_[2], codes, part_[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
  }

 private:
  __m512i part_[4];
};

#elif defined(__AVX512BW__)

// AVX-512BW permutes words: the words (2 i, 2 i + 1) of the table at codes / 2, once for the even codes of a vector and
// once for the odd ones; then the byte that the lowest bit names.
class Table {
 public:
  static constexpr int64_t width = 64;
  explicit Table(const uint8_t* table) { std::memcpy(part_, table, sizeof part_); }
  QK_INLINE __m512i at(__m512i codes) const {
    const __m512i even = words(_mm512_srli_epi16(codes, 1), _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x80)));
    const __m512i odd = words(_mm512_srli_epi16(codes, 9), _mm512_movepi16_mask(codes));
    const __m512i places = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0e0e0c0c0a0a0808, 0x0606040402020000));
    const __m512i byte = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(1), places, 0xea);  // codes & 1 | places
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(even, byte), 0xaaaaaaaaaaaaaaaa, odd, byte);
  }

 private:
  QK_INLINE __m512i words(__m512i index, __mmask32 upper) const {
    const __m512i low = _mm512_permutex2var_epi16(part_[0], index, part_[1]);
    return _mm512_mask_mov_epi16(low, upper, _mm512_permutex2var_epi16(part_[2], index, part_[3]));
  }
  __m512i part_[4];
};

#elif defined(__AVX2__)

// Sixteen shuffles by the lower half of a code; its upper bits choose between them.
class Table {
 public:
  static constexpr int64_t width = 32;
  explicit Table(const uint8_t* table) : table_(table) {}
  QK_INLINE __m256i at(__m256i codes) const {
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(15)), bit4 = _mm256_slli_epi16(codes, 3);
    const __m256i bit5 = _mm256_slli_epi16(codes, 2), bit6 = _mm256_slli_epi16(codes, 1);
    __m256i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table_ + 16 * i));
      v[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), low);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = _mm256_blendv_epi8(v[2 * i], v[2 * i + 1], bit4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = _mm256_blendv_epi8(v[2 * i], v[2 * i + 1], bit5);
    v[0] = _mm256_blendv_epi8(v[0], v[1], bit6);
    v[1] = _mm256_blendv_epi8(v[2], v[3], bit6);
    return _mm256_blendv_epi8(v[0], v[1], codes);
  }

 private:
  const uint8_t* table_;
};

#else

class Table {
 public:
  explicit Table(const uint8_t* table) : table_(table) {}
  QK_INLINE uint8_t at(uint8_t code) const { return table_[code]; }

 private:
  const uint8_t* table_;
};

#endif

// out[i] = table[codes[i]] for n codes. They may lie in the same place.
QK_INLINE void look_up(const Table& table, const uint8_t* codes, uint8_t* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(out + i, table.at(_mm512_loadu_si512(codes + i)));
  if (i < n) {
    const __mmask64 some = ~uint64_t{0} >> (64 - (n - i));
    _mm512_mask_storeu_epi8(out + i, some, table.at(_mm512_maskz_loadu_epi8(some, codes + i)));
  }
#elif defined(__AVX2__)
  __m256i v;
  for (; i + 32 <= n; i += 32) {
    std::memcpy(&v, codes + i, 32);
    v = table.at(v);
    std::memcpy(out + i, &v, 32);
  }
  if (i < n) {
    uint8_t some[32] = {};
    for (int64_t j = 0; i + j < n; ++j) some[j] = codes[i + j];
    std::memcpy(&v, some, 32);
    v = table.at(v);
    std::memcpy(some, &v, 32);
    for (int64_t j = 0; i + j < n; ++j) out[i + j] = some[j];
  }
#else
  for (; i < n; ++i) out[i] = table.at(codes[i]);
#endif
}

// n bytes; short rows are many, so no call.
QK_INLINE void copy_row(const uint8_t* from, uint8_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= n; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  const __mmask64 some = i < n ? ~uint64_t{0} >> (64 - (n - i)) : 0;
  _mm512_mask_storeu_epi8(to + i, some, _mm512_maskz_loadu_epi8(some, from + i));
#else
  for (; i + 16 <= n; i += 16) std::memcpy(to + i, from + i, 16);
  for (; i < n; ++i) to[i] = from[i];
#endif
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
