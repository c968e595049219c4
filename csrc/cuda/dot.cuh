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

}  // namespace qk::cuda
