#include "ops/pack.h"

#include "cuda/launch.cuh"

namespace qk::cuda {
namespace {

// A thread makes one word of four bytes; rows are whole words, and what is past `cols` is zero bits.
template <int bits>
__global__ void pack_kernel(PackArgs a) {
  constexpr int per_word = 4 * Bits<bits>::per_byte;
  const int64_t row_words = a.row_bytes / 4, words = a.rows * row_words, step = int64_t{gridDim.x} * block_threads;
  for (int64_t word = int64_t{blockIdx.x} * block_threads + threadIdx.x; word < words; word += step) {
    const int64_t col = word % row_words * per_word;
    const uint8_t* codes = a.codes + word / row_words * a.cols + col;
    const int64_t count = a.cols - col;
    Values<uint8_t, per_word> v{};
    if (count >= per_word && reinterpret_cast<uintptr_t>(codes) % per_word == 0) {
      v = load<per_word>(codes);
    } else {
#pragma unroll
      for (int i = 0; i < per_word; ++i)
        if (i < count) v.v[i] = codes[i];
    }
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < per_word; ++i) packed |= static_cast<uint32_t>(v.v[i] & Bits<bits>::mask) << (i * bits);
    reinterpret_cast<uint32_t*>(a.packed)[word] = packed;
  }
}

}  // namespace

void pack(const PackArgs& a) {
  with_bits(a.bits, [&](auto bits) {
    launch("pack", pack_kernel<bits>, ceil_div(a.rows * (a.row_bytes / 4), block_threads), a);
  });
#if defined(QK_EMULATED)  // there the face reads it, since the tensors are the CPU's
  for (int64_t i = 0; i < a.rows; ++i) a.used[i] = 0;
  for (int64_t i = 0; i < a.rows * a.cols; ++i) a.used[i / a.cols] |= a.codes[i];
#endif
}

}  // namespace qk::cuda
