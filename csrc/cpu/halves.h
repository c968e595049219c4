// Tensors of float32, float16 or bfloat16, of which kernels see float32.
#pragma once
#include <cstring>

#include "core/chunks.h"
#include "core/halves.h"
#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

// to[i * apart] = from[at + i], as floats.
inline void widen(FloatType type, const void* from, int64_t at, int64_t n, float* __restrict to, int64_t apart = 1) {
  with_float(type, [&](auto kind) {
    const auto* x = static_cast<const decltype(kind)*>(from) + at;
    if (apart == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = widened(x[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i * apart] = widened(x[i]);
  });
}

// to[at + i] = from[i], rounded.
inline void narrow_all(FloatType type, const float* __restrict from, int64_t n, void* to, int64_t at) {
  with_float(type, [&](auto kind) {
    auto* __restrict y = static_cast<decltype(kind)*>(to) + at;
    for (int64_t i = 0; i < n; ++i) narrow(from[i], y + i);
  });
}

// The chunk of n values from `at` on of tensors of one type, as floats: of float32 where it lies, else in a room of its
// own, from which results go back.
class FloatChunk {
 public:
  FloatChunk(FloatType type, int64_t at, int64_t n) : type_(type), at_(at), n_(n) {}

  template <int index>
  const float* read(const void* tensor) {
    if (type_ == FloatType::float32) return static_cast<const float*>(tensor) + at_;
    widen(type_, tensor, at_, n_, room_[index]);
    return room_[index];
  }
  // Where results are to be written, for `leave`.
  template <int index>
  float* write(void* tensor) {
    return type_ == FloatType::float32 ? static_cast<float*>(tensor) + at_ : room_[index];
  }
  template <int index>
  void leave(void* tensor) const {
    if (type_ != FloatType::float32) narrow_all(type_, room_[index], n_, tensor, at_);
  }

 private:
  const FloatType type_;
  const int64_t at_, n_;
  alignas(64) float room_[4][sum_chunk];
};

}  // namespace
}  // namespace qk::cpu::QK_ISA
