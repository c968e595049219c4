// What every *.simd.cpp shares. Such a file is compiled once per instruction set into the namespace QK_ISA, so all of
// its helpers are static or anonymous: of an ordinary inline function the linker keeps one copy, perhaps the AVX-512
// one (tests/test_isa.py looks for such). Loops are written so that the compiler vectorizes them: no calls, no
// aliasing, selects instead of branches.
#pragma once
#include <cstdint>

#include "core/bits.h"
#include "core/parallel.h"

#define QK_INLINE inline __attribute__((always_inline))

namespace qk::cpu::QK_ISA {
namespace {

// Values a thread should get at least; below this a second thread costs more than it saves.
constexpr int64_t grain_values = 16384;

// Not std::min: see above.
template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
