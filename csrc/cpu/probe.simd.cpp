#include "core/probe.h"

#if defined(QK_ISA_AMX)
#include "cpu/amx.h"
#else
#include "cpu/dot.h"
#endif

namespace qk::cpu::QK_ISA {

#if defined(QK_ISA_AMX)

// Four independent sums of tiles, as the kernel has them.
void probe(const ProbeArgs& a) {
  alignas(64) uint8_t bytes[side * 64];
  for (int i = 0; i < side * 64; ++i) bytes[i] = static_cast<uint8_t>(i * a.rounds);
  TileState state;
  state.set_rows(side);
  load_tile<0>(bytes, 64);
  load_tile<1>(bytes, 64);
  load_tile<2>(bytes, 64);
  load_tile<3>(bytes, 64);
  load_tile<4>(bytes, 64);
  load_tile<5>(bytes, 64);
  load_tile<6>(bytes, 64);
  load_tile<7>(bytes, 64);
  for (int64_t round = 0; round < a.rounds; ++round) {
    products<0, 4, 6>();
    products<1, 4, 7>();
    products<2, 5, 6>();
    products<3, 5, 7>();
  }
  state.release();
  *a.operations = a.rounds * 4 * side * side * tile_k * 2;
}

#else

// As many independent sums as the register tile has, nothing is loaded.
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
    for (int i = 0; i < sums; ++i) {
// Where products and sums are apart, the compiler would multiply once and only add.
#if defined(QK_ISA_AVX2)
      asm volatile("" : "+x"(x));
#elif defined(QK_ISA_GENERIC)
      asm volatile("" : "+m"(x));
#endif
      acc[i] = dot4<true>(acc[i], x, w);
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < sums; ++i) acc[0] = sum(acc[0], acc[i]);
  store(out, acc[0]);
  asm volatile("" ::"r"(out) : "memory");  // or the compiler drops it, and of AVX2's two halves the unused one
  *a.operations = a.rounds * sums * 16 * 4 * 2;
}

#endif

}  // namespace qk::cpu::QK_ISA
