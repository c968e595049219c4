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

}  // namespace
}  // namespace qk::cpu::QK_ISA
