// From sums to results: the arithmetic of ops/epilogue.h for sixteen output channels at once. Vectors of the compiler
// (vector_size), which it splits to what the instruction set has.
#pragma once
#include <cstring>

#include "cpu/simd.h"
#include "ops/epilogue.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // such vectors never cross a call here: everything below is inlined

namespace qk::cpu::QK_ISA {
namespace {

constexpr int block = 16;  // output channels

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Codes __attribute__((vector_size(16)));

template <class Vector, class T>
QK_INLINE Vector load(const T* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// valid: how many of the sixteen there are; 16 or more is the rule.
template <class Vector, class T>
QK_INLINE void store_some(T* p, const Vector& v, int64_t valid) {
  if (valid >= block) {
    std::memcpy(p, &v, sizeof v);
  } else {
    T some[block];
    std::memcpy(some, &v, sizeof v);
    for (int64_t i = 0; i < valid; ++i) p[i] = some[i];
  }
}

// float(acc - zero * sums) * step with step = x_step * weight_step. The difference wraps, as the exact one does that
// fits int32.
QK_INLINE Floats scaled(const int32_t* acc, const Words& zero_sums, const Floats& step) {
  return __builtin_convertvector(reinterpret_cast<Ints>(load<Words>(acc) - zero_sums), Floats) * step;
}

// What the results of a call share. Without an activation the limits are infinite: a comparison less to think of.
class Finish {
 public:
  explicit Finish(const Epilogue& e)
      : low_(e.activation == Activation::none ? -__builtin_inff() : 0.0f),
        high_(e.activation == Activation::relu6 ? 6.0f : __builtin_inff()),
        codes_(e.out_step != nullptr),
        inverse_(codes_ ? 1.0f / *e.out_step : 0.0f),
        code_low_(codes_ ? static_cast<float>(-*e.out_zero) : 0.0f),
        code_high_(codes_ ? static_cast<float>(top_code(e.out_bits) - *e.out_zero) : 0.0f),
        zero_(codes_ ? *e.out_zero : 0) {}

  // y with bias -> `valid` results from index `at` of out on. NaN passes the limits, as in torch; its code is the zero.
  QK_INLINE void write(const Floats& result, void* out, int64_t at, int64_t valid) const {
    const Floats nothing = {}, low = nothing + low_, high = nothing + high_;
    Floats y = result < low ? low : result;
    y = y > high ? high : y;
    if (!codes_) return store_some(static_cast<float*>(out) + at, y, valid);
    const Floats bottom = nothing + code_low_, top = nothing + code_high_, magic = nothing + 12582912.0f;
    Floats t = y * inverse_;
    t = t == t ? t : nothing;
    t = t > bottom ? t : bottom;
    t = t < top ? t : top;
    const Ints code = __builtin_convertvector((t + magic) - magic, Ints) + zero_;
    store_some(static_cast<uint8_t*>(out) + at, __builtin_convertvector(code, Codes), valid);
  }

 private:
  float low_, high_;
  bool codes_;
  float inverse_, code_low_, code_high_;
  int32_t zero_;
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
