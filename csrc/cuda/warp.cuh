// What a warp does together: products of matrices, reads of them from shared memory, and copies into it that go on
// while it works. Compiled for the host they do the same at once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/halves.h"
#include "cuda/dot.cuh"

namespace qk::cuda {

// sum [16, 8] += a [16, 32] * b [32, 8], of bytes: a signed, or unsigned and below 128, b unsigned. Lane 4 g + t holds
// of a what core/layout.h says, of b column g at 4 t .. 4 t + 3 and 16 further, of the sum rows g and g + 8 at columns
// 2 t and 2 t + 1.
template <bool is_signed>
__device__ inline void multiply(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(QK_EMULATED)
  struct Factors {
    uint32_t a[4], b[2];
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  emulated::together(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](const auto& of) {
    for (unsigned from = 0; from < 4; ++from) {
      const Factors row = of(4 * g + from), columns[2] = {of(8 * t + from), of(8 * t + 4 + from)};
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
          sum[i] = dot4(columns[i % 2].b[half], row.a[i / 2 + 2 * half], sum[i]);  // unsigned bytes are below 128
    }
    return 0;
  });
#else
  if constexpr (is_signed)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// sum [16, 8] += a [16, 64] * b [64, 8], of unsigned codes of 4 bits: register i of a has in nibble j row g + 8 (i & 1)
// at 32 (i >> 1) + 8 t + j, register r of b column g at 32 r + 8 t + j; the sum as in multiply.
__device__ inline void multiply_int4(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(QK_EMULATED)
  const auto low = [](uint32_t word) { return word & 0x0f0f0f0fu; };
  uint32_t parts[2][4];
  for (int i = 0; i < 4; ++i) parts[0][i] = low(a[i]), parts[1][i] = low(a[i] >> 4);
  for (const auto& part : parts) multiply<false>(sum, part, low(b0), low(b1)), b0 >>= 4, b1 >>= 4;
#else
  asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// sum [16, 8] += a [16, 16] * b [16, 8], of bfloat16 or float16, in float32: register i of a has row g + 8 (i & 1) at
// 2 t and 2 t + 1, from 8 on where i > 1, b column g likewise; the sum as in multiply.
template <bool bfloat16>
__device__ inline void multiply_halves(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(QK_EMULATED)
  struct Factors {
    uint32_t a[4], b[2];
  };
  const auto value = [](uint32_t pair, int i) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * i);
    return bfloat16 ? float_of_bfloat16(bits) : float_of_float16(bits);
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  emulated::together(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](const auto& of) {
    for (unsigned from = 0; from < 4; ++from) {
      const Factors row = of(4 * g + from), columns[2] = {of(8 * t + from), of(8 * t + 4 + from)};
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          sum[i] += value(row.a[i / 2 + j / 2 * 2], j % 2) * value(columns[i % 2].b[j / 2], j % 2);
    }
    return 0;
  });
#else
  if constexpr (bfloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The sums of two pairs of bfloat16 or float16.
template <bool bfloat16>
__device__ inline uint32_t add_halves(uint32_t a, uint32_t b) {
#if defined(QK_EMULATED)
  uint32_t sums = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto x = static_cast<uint16_t>(a >> i), y = static_cast<uint16_t>(b >> i);
    sums |= uint32_t{bfloat16 ? bfloat16_of(float_of_bfloat16(x) + float_of_bfloat16(y))
                              : float16_of(float_of_float16(x) + float_of_float16(y))}
            << i;
  }
  return sums;
#else
  uint32_t sums;
  if constexpr (bfloat16)  // sm_80 adds by a product with 1
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  return sums;
#endif
}

// Four matrices of 8 rows of 16 bytes: lane 8 m + r gives the address of row r of matrix m, in shared memory, and gets
// in part m bytes 4 t .. 4 t + 3 of its row g, where the lane is 4 g + t.
__device__ inline void load_matrices(uint32_t (&parts)[4], const uint8_t* row) {
#if defined(QK_EMULATED)
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  emulated::together(row, [&](const auto& of) {
    for (unsigned m = 0; m < 4; ++m) std::memcpy(&parts[m], of(8 * m + g) + 4 * t, 4);
    return 0;
  });
#else
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(at)
               : "memory");
#endif
}

// `bytes` (4 or 16) from global to shared memory, both at multiples of that; there after wait_copies and a barrier.
template <int bytes>
__device__ inline void copy_async(uint8_t* to, const uint8_t* from) {
#if defined(QK_EMULATED)
  std::memcpy(to, from, bytes);
#else
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(bytes) : "memory");
#endif
}

// Ends a batch of a thread's copies; it may be empty.
__device__ inline void end_batch() {
#if !defined(QK_EMULATED)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all of a thread's batches but the newest `open` are there.
template <int open>
__device__ inline void wait_copies() {
#if !defined(QK_EMULATED)
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
#endif
}

}  // namespace qk::cuda
