// What every *.simd.cpp shares. Such a file is compiled once per instruction set into the namespace QK_ISA, so all of
// its helpers are static or anonymous: of an ordinary inline function the linker keeps one copy, perhaps the AVX-512
// one. Loops are written so that the compiler vectorizes them: no calls, no aliasing, selects instead of branches.
#pragma once
#include <cstdint>

#include "core/bits.h"
#include "core/parallel.h"

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

// Ties to even, exact for |t| < 2^22: adding 1.5 * 2^23 leaves no fraction bits. Callers clamp first, which for integer
// bounds commutes with rounding.
inline float round_even(float t) { return (t + 12582912.0f) - 12582912.0f; }

// The number q - zero with q the code of value * step; NaN gives 0 (code zero). low = -zero, high = top - zero.
inline float clamp_units(float t, float low, float high) {
  t = t == t ? t : 0.0f;
  t = t > low ? t : low;
  return t < high ? t : high;
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
