#include "core/probe.h"

#include "cpu/dot.h"

namespace qk::cpu::QK_ISA {

// As many independent sums as the register tile has; nothing is loaded.
void probe(const ProbeArgs& a) {
  constexpr int sums = probe_sums;
  alignas(64) uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i * a.rounds);  // sums that the compiler cannot unite
  alignas(64) int32_t out[16];
  Lanes acc[sums];
#pragma GCC unroll 32
  for (int i = 0; i < sums; ++i) acc[i] = dot4<true>(none(), broadcast4(bytes + i), load64(bytes));
  Four x = broadcast4(bytes);
  const Bytes w = load64(bytes);
  for (int64_t round = 0; round < a.rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < sums; ++i) acc[i] = dot4<true>(acc[i], x, w);
  }
#pragma GCC unroll 32
  for (int i = 1; i < sums; ++i) acc[0] = sum(acc[0], acc[i]);
  store(out, acc[0]);
  asm volatile("" ::"r"(out[0]));  // or the compiler drops it all
  *a.operations = a.rounds * sums * 16 * 4 * 2;
}

}  // namespace qk::cpu::QK_ISA
