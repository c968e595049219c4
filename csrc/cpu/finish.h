// From sums to results: the arithmetic of ops/epilogue.h for sixteen output channels at once. Vectors of the compiler
// (vector_size), which it splits to what the instruction set has.
#pragma once
#include <cstring>
#include <type_traits>

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

// The first `valid` of sixteen values, 0 behind them.
template <class Vector, class T>
QK_INLINE Vector load_some(const T* p, int64_t valid) {
  if (valid >= block) return load<Vector>(p);
  T some[block] = {};
  for (int64_t i = 0; i < valid; ++i) some[i] = p[i];
  return load<Vector>(some);
}

// float(acc - zero * sums) * step with step = x_step * weight_step. The difference wraps, as the exact one does that
// fits int32.
QK_INLINE Floats scaled(const int32_t* acc, const Words& zero_sums, const Floats& step) {
  return __builtin_convertvector(reinterpret_cast<Ints>(load<Words>(acc) - zero_sums), Floats) * step;
}

enum class Residual { none, codes, floats };

// What the results of a call share. Without an activation the limits are infinite: a comparison less to think of.
template <bool codes, Residual residual>
class Finish {
 public:
  explicit Finish(const Epilogue& e)
      : low_(e.activation == Activation::none ? -__builtin_inff() : 0.0f),
        high_(e.activation == Activation::relu6 ? 6.0f : __builtin_inff()),
        inverse_(codes ? 1.0f / *e.out_step : 0.0f),
        code_low_(codes ? static_cast<float>(-*e.out_zero) : 0.0f),
        code_high_(codes ? static_cast<float>(top_code(e.out_bits) - *e.out_zero) : 0.0f),
        zero_(codes ? *e.out_zero : 0),
        added_(e.residual),
        added_step_(residual == Residual::codes ? *e.residual_step : 0.0f),
        added_zero_(residual == Residual::codes ? *e.residual_zero : 0) {}

  // y with bias -> `valid` results from index `at` of out on. NaN passes the limits, as in torch; its code is the zero.
  QK_INLINE void write(const Floats& sum, void* out, int64_t at, int64_t valid) const {
    const Floats nothing = {}, low = nothing + low_, high = nothing + high_;
    Floats y = sum;
    if constexpr (residual == Residual::codes) {
      const Codes u = load_some<Codes>(static_cast<const uint8_t*>(added_) + at, valid);
      y = y + __builtin_convertvector(__builtin_convertvector(u, Ints) - added_zero_, Floats) * added_step_;
    }
    if constexpr (residual == Residual::floats)
      y = y + load_some<Floats>(static_cast<const float*>(added_) + at, valid);
    y = y < low ? low : y;
    y = y > high ? high : y;
    if constexpr (!codes) {
      store_some(static_cast<float*>(out) + at, y, valid);
    } else {
      const Floats bottom = nothing + code_low_, top = nothing + code_high_, magic = nothing + 12582912.0f;
      Floats t = y * inverse_;
      t = t == t ? t : nothing;
      t = t > bottom ? t : bottom;
      t = t < top ? t : top;
      const Ints code = __builtin_convertvector((t + magic) - magic, Ints) + zero_;
      store_some(static_cast<uint8_t*>(out) + at, __builtin_convertvector(code, Codes), valid);
    }
  }

 private:
  float low_, high_, inverse_, code_low_, code_high_;
  int32_t zero_;
  const void* added_;
  float added_step_;
  int32_t added_zero_;
};

// body(finish) with the Finish of a call.
template <class Body>
void with_finish(const Epilogue& e, const Body& body) {
  const auto with = [&](auto codes) {
    if (!e.residual) return body(Finish<codes, Residual::none>(e));
    if (e.residual_step) return body(Finish<codes, Residual::codes>(e));
    return body(Finish<codes, Residual::floats>(e));
  };
  if (e.out_step) return with(std::true_type());
  return with(std::false_type());
}

}  // namespace
}  // namespace qk::cpu::QK_ISA
