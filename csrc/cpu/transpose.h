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

// to[3 * i + j] = from[j * from_stride + i] for 16 values of i: an image of three channels.
inline void interleave_3(const uint8_t* from, int64_t from_stride, uint8_t* to) {
  Bytes16 r, g, b;
  __builtin_memcpy(&r, from, 16);
  __builtin_memcpy(&g, from + from_stride, 16);
  __builtin_memcpy(&b, from + 2 * from_stride, 16);
  Bytes16 v[3] = {__builtin_shufflevector(r, g, 0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5),
                  __builtin_shufflevector(r, g, 21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26),
                  __builtin_shufflevector(r, g, 0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0)};
  v[0] = __builtin_shufflevector(v[0], b, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
  v[1] = __builtin_shufflevector(v[1], b, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
  v[2] = __builtin_shufflevector(v[2], b, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
  __builtin_memcpy(to, v, 48);
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
