// Transposes bytes with the compiler's own vectors, so that every instruction set gets its shuffles.
#pragma once
#include <cstdint>

#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// to[j * to_stride + i] = from[i * from_stride + j] for 16 values of i and the first `rows` of 16 values of j.
// One round interleaves vector i with vector i + 8; four rounds rotate the 8 bits of (i, j) by four places.
inline void transpose_16(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride, int64_t rows) {
  Bytes16 v[16], w[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&v[i], from + i * from_stride, 16);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      w[2 * i + 1] =
          __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) v[i] = w[i];
  }
  if (rows == 16)
    for (int j = 0; j < 16; ++j) __builtin_memcpy(to + j * to_stride, &v[j], 16);
  else
    for (int64_t j = 0; j < rows; ++j) __builtin_memcpy(to + j * to_stride, &v[j], 16);
}

// to[3 * i + c] = from[c * stride + i] for 16 values of i: an image of three colours.
inline void interleave_3(const uint8_t* from, int64_t stride, uint8_t* to) {
  Bytes16 r, g, b;
  __builtin_memcpy(&r, from, 16);
  __builtin_memcpy(&g, from + stride, 16);
  __builtin_memcpy(&b, from + 2 * stride, 16);
  constexpr int x = -1;  // filled from b
  const Bytes16 rg0 = __builtin_shufflevector(r, g, 0, 16, x, 1, 17, x, 2, 18, x, 3, 19, x, 4, 20, x, 5);
  const Bytes16 rg1 = __builtin_shufflevector(r, g, 21, x, 6, 22, x, 7, 23, x, 8, 24, x, 9, 25, x, 10, 26);
  const Bytes16 rg2 = __builtin_shufflevector(r, g, x, 11, 27, x, 12, 28, x, 13, 29, x, 14, 30, x, 15, 31, x);
  const Bytes16 o0 = __builtin_shufflevector(rg0, b, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
  const Bytes16 o1 = __builtin_shufflevector(rg1, b, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
  const Bytes16 o2 = __builtin_shufflevector(rg2, b, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
  __builtin_memcpy(to, &o0, 16);
  __builtin_memcpy(to + 16, &o1, 16);
  __builtin_memcpy(to + 32, &o2, 16);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
