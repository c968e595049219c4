#include "core/probe.h"
#include "cpu/dot.h"

namespace qk::cpu::QK_ISA {

// Read as the kernels read weights: 64 bytes at a time, each into a product.
void probe_read(const ProbeReadArgs& a) {
  constexpr int sums = 8;
  alignas(64) uint8_t one[64] = {1, 1, 1, 1};
  alignas(64) int32_t out[16];
  const Four x = broadcast4(one);
  Lanes acc[sums];
#pragma GCC unroll 8
  for (int i = 0; i < sums; ++i) acc[i] = none();
  for (int64_t round = 0; round < a.rounds; ++round) {
    for (const uint8_t *p = a.data, *end = a.data + a.bytes; p < end; p += 64 * sums) {
#pragma GCC unroll 8
      for (int i = 0; i < sums; ++i) acc[i] = dot4<true>(acc[i], x, load64(p + 64 * i));
    }
    asm volatile("" ::: "memory");  // every round reads again
  }
#pragma GCC unroll 8
  for (int i = 1; i < sums; ++i) acc[0] = sum(acc[0], acc[i]);
  store(out, acc[0]);
  asm volatile("" ::"r"(out[0]));
}

}  // namespace qk::cpu::QK_ISA
