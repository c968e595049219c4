#pragma once
#include <cstdint>

#include "core/bits.h"

namespace qk::cuda {

// sum + the four products of unsigned with signed bytes, modulo 2^32.
QK_HD inline int32_t dot4(uint32_t unsigned_bytes, uint32_t signed_bytes, int32_t sum) {
#if defined(__CUDA_ARCH__)
  int32_t result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(unsigned_bytes), "r"(signed_bytes), "r"(sum));
  return result;
#else
  uint32_t result = sum;
  for (int i = 0; i < 32; i += 8)
    result +=
        static_cast<uint32_t>(static_cast<int>(unsigned_bytes >> i & 255) * static_cast<int8_t>(signed_bytes >> i));
  return static_cast<int32_t>(result);
#endif
}

// Bytes a, b, c, d of 0 to 7: of the first word, then of the second.
template <int a, int b, int c, int d>
QK_HD inline uint32_t bytes_of(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, a | b << 4 | c << 8 | d << 12);
#else
  const uint64_t both = uint64_t{second} << 32 | first;
  const auto byte = [both](int i) { return static_cast<uint32_t>(both >> 8 * i & 255); };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
#endif
}

// Byte j of word i becomes byte i of word j.
QK_HD inline void transpose(uint32_t (&words)[4]) {
  const uint32_t low[2] = {bytes_of<0, 4, 1, 5>(words[0], words[1]), bytes_of<0, 4, 1, 5>(words[2], words[3])};
  const uint32_t high[2] = {bytes_of<2, 6, 3, 7>(words[0], words[1]), bytes_of<2, 6, 3, 7>(words[2], words[3])};
  words[0] = bytes_of<0, 1, 4, 5>(low[0], low[1]), words[1] = bytes_of<2, 3, 6, 7>(low[0], low[1]);
  words[2] = bytes_of<0, 1, 4, 5>(high[0], high[1]), words[3] = bytes_of<2, 3, 6, 7>(high[0], high[1]);
}

}  // namespace qk::cuda
