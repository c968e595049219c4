// Products of matrices that four warps of Hopper make together, without waiting for them (wgmma, of sm_90a alone).
// Compiled for the host each warp makes its own rows of them, at once.
#pragma once
#include "cuda/loader.cuh"

#if defined(QK_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_WARP_GROUPS 1
#endif

namespace qk::cuda {

// What the instruction makes of bits 7 and 8 of an address in its layout of 64 bytes a row: chunks of 16 bytes change
// their places by them. place_in_stage says the same.
QK_HD constexpr int swizzled(int byte) { return byte ^ (byte >> 7 & 3) << 4; }
static_assert([] {
  for (int token = 0; token < 16; ++token)
    for (int at = 0; at < chunks; ++at)
      if (swizzled(token * tile_k + at * chunk) != place_in_stage(token, at)) return false;
  return true;
}());

// For the instruction: rows of 64 bytes, eight of them every 512 bytes, swizzled.
__device__ inline uint64_t descriptor_of([[maybe_unused]] const uint8_t* rows) {
#if defined(QK_EMULATED)
  return 0;
#else
  const uint64_t at = __cvta_generic_to_shared(rows);
  return (at & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
#endif
}

// sum [64, 8 tiles] += a [64, 32] * b [32, 8 tiles], of bytes as in `multiply`, of which the warp's 16 rows and the
// lane's registers are the same; column 8 c + i of b are bytes 32 step .. 32 step + 31 of row 8 c + i of `rows`, which
// start at a multiple of 512. All warps of the group must be there. sum and a must not be touched before the wait.
template <bool is_signed, int tiles>
__device__ void multiply_group(int32_t (&sum)[tiles][4], const uint32_t (&a)[4], const uint8_t* rows, int step) {
  static_assert(tiles == 8 || tiles == 16);
#if defined(QK_EMULATED)
  struct Factor {
    uint32_t a[4];
  };
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  emulated::together(Factor{{a[0], a[1], a[2], a[3]}}, [&](const auto& of) {
    for (int from = 0; from < 4; ++from) {
      const Factor row = of(4 * g + from);
      for (int c = 0; c < tiles; ++c)
        for (int i = 0; i < 4; ++i)
          for (int half = 0; half < 2; ++half) {
            uint32_t b;
            const int column = 8 * c + 2 * t + i % 2, byte = step_k * step + 16 * half + 4 * from;
            std::memcpy(&b, rows + swizzled(column * tile_k + byte), 4);
            sum[c][i] = dot4(b, row.a[i / 2 + 2 * half], sum[c][i]);
          }
    }
    return 0;
  });
#elif defined(QK_WARP_GROUPS)
  const uint64_t b = descriptor_of(rows) + (step * step_k >> 4);
#define QK_TILE(c) "+r"(sum[c][0]), "+r"(sum[c][1]), "+r"(sum[c][2]), "+r"(sum[c][3])
#define QK_TILES(c)                                                                                           \
  QK_TILE(c), QK_TILE(c + 1), QK_TILE(c + 2), QK_TILE(c + 3), QK_TILE(c + 4), QK_TILE(c + 5), QK_TILE(c + 6), \
      QK_TILE(c + 7)
#define QK_8                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QK_16                                                                                              \
  QK_8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
       "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QK_64(types) "wgmma.mma_async.sync.aligned.m64n64k32.s32." types " {" QK_8 "}, {%32, %33, %34, %35}, %36, 1;"
#define QK_128(types) "wgmma.mma_async.sync.aligned.m64n128k32.s32." types " {" QK_16 "}, {%64, %65, %66, %67}, %68, 1;"
#define QK_GIVEN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
  if constexpr (tiles == 8 && is_signed) asm volatile(QK_64("s8.u8") : QK_TILES(0) : QK_GIVEN);
  if constexpr (tiles == 8 && !is_signed) asm volatile(QK_64("u8.u8") : QK_TILES(0) : QK_GIVEN);
  if constexpr (tiles == 16 && is_signed) asm volatile(QK_128("s8.u8") : QK_TILES(0), QK_TILES(8) : QK_GIVEN);
  if constexpr (tiles == 16 && !is_signed) asm volatile(QK_128("u8.u8") : QK_TILES(0), QK_TILES(8) : QK_GIVEN);
#undef QK_TILE
#undef QK_TILES
#undef QK_8
#undef QK_16
#undef QK_64
#undef QK_128
#undef QK_GIVEN
#endif
}

// Nothing is done to these registers later than here, or earlier.
template <class T>
__device__ void settle([[maybe_unused]] T& registers) {
#if !defined(QK_EMULATED)
  if constexpr (std::is_array_v<T>)
#pragma unroll
    for (auto& part : registers) settle(part);
  else
    asm volatile("" : "+r"(registers)::"memory");
#endif
}

// Before products of these factors, which other instructions wrote.
template <class T>
__device__ void begin_products([[maybe_unused]] T& factors) {
#if !defined(QK_EMULATED) && defined(QK_WARP_GROUPS)
  settle(factors);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a batch of a group's products.
__device__ inline void end_products() {
#if !defined(QK_EMULATED) && defined(QK_WARP_GROUPS)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all of a group's batches but the newest `open` are done. results: of those, which may be read from then on.
template <int open, class... T>
__device__ void wait_products([[maybe_unused]] T&... results) {
#if !defined(QK_EMULATED) && defined(QK_WARP_GROUPS)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(open) : "memory");
  (settle(results), ...);
#endif
}

// What this thread's copies have put into shared memory is seen by products, from the next barrier on.
__device__ inline void show_copies() {
#if !defined(QK_EMULATED) && defined(QK_WARP_GROUPS)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace qk::cuda
