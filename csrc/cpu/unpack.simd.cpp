#include "ops/unpack.h"

#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

template <int B>
void unpack_bytes(const uint8_t* __restrict packed, uint8_t* __restrict codes, int64_t bytes) {
  constexpr int n = Bits<B>::per_byte;
  if constexpr (B == 2) {  // spread inside a word, little endian: four single bytes would not vectorize
    for (int64_t i = 0; i < bytes; ++i) {
      uint32_t word = packed[i];
      word = (word | word << 12) & 0x000f000f;
      word = (word | word << 6) & 0x03030303;
      __builtin_memcpy(codes + i * n, &word, n);
    }
  } else {
    for (int64_t i = 0; i < bytes; ++i)
      for (int j = 0; j < n; ++j) codes[i * n + j] = (packed[i] >> (j * B)) & Bits<B>::mask;
  }
}

template <int B>
void unpack_row(const UnpackArgs& a, int64_t row) {
  constexpr int n = Bits<B>::per_byte;
  const uint8_t* packed = a.packed + row * a.row_bytes;
  uint8_t* codes = a.codes + row * a.cols;
  const int64_t whole = a.cols / n, rest = a.cols % n;
  unpack_bytes<B>(packed, codes, whole);
  if (rest) {
    uint8_t last[n];
    unpack_bytes<B>(packed + whole, last, 1);
    for (int64_t j = 0; j < rest; ++j) codes[whole * n + j] = last[j];
  }
}

}  // namespace

void unpack(const UnpackArgs& a) {
  with_bits(a.bits, [&](auto bits) { each_row(a.rows, a.cols, [&](int64_t row) { unpack_row<bits>(a, row); }); });
}

}  // namespace qk::cpu::QK_ISA
