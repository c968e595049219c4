// The only list of widths. No torch, usable in CUDA.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define QK_HD __host__ __device__
#else
#define QK_HD
#endif

namespace qk {

// Fake-quantization and activation codes take any width from 2 to 8.
QK_HD constexpr bool is_fake_quant_width(int64_t bits) { return bits >= 2 && bits <= 8; }
// Weights at rest are packed in 2, 4 or 8 bits; 3-bit codes are stored in 4.
QK_HD constexpr bool is_storage_width(int64_t bits) { return bits == 2 || bits == 4 || bits == 8; }

template <int B>
struct Bits {
  static_assert(is_storage_width(B), "a width that divides a byte");
  static constexpr int per_byte = 8 / B, mask = (1 << B) - 1;
};

// Bytes of a packed row at rest: a multiple of 16, so that a kernel may read whole vectors. No cols overflows: rows
// that are not there may have any length.
QK_HD constexpr int64_t packed_row_bytes(int64_t cols, int64_t bits) {
  const uint64_t per_vector = static_cast<uint64_t>(128 / bits);
  return static_cast<int64_t>((static_cast<uint64_t>(cols) + per_vector - 1) / per_vector * 16);
}

QK_HD constexpr int top_code(int64_t bits) { return (1 << bits) - 1; }

// Not inline: files compiled per instruction set must not bring copies of std::string along.
[[noreturn]] void throw_bad_bits(int64_t bits);

// Calls f with the storage width as a compile-time constant.
template <class F>
static inline decltype(auto) with_bits(int64_t bits, F&& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 8: return f(std::integral_constant<int, 8>{});
  }
  throw_bad_bits(bits);
}

}  // namespace qk
