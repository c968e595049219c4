#include "ops/unpack.h"

#include "cuda/launch.cuh"

namespace qk::cuda {
namespace {

// A thread reads one word of four bytes.
template <int bits>
__global__ void unpack_kernel(UnpackArgs a, int64_t row_words) {
  constexpr int per_word = 4 * Bits<bits>::per_byte;
  const int64_t words = a.rows * row_words, step = int64_t{gridDim.x} * block_threads;
  for (int64_t word = int64_t{blockIdx.x} * block_threads + threadIdx.x; word < words; word += step) {
    const int64_t row = word / row_words, col = word % row_words * per_word, count = a.cols - col;
    const uint8_t* at = a.packed + row * a.row_bytes + word % row_words * 4;
    uint8_t* codes = a.codes + row * a.cols + col;
    uint32_t packed;
    if (reinterpret_cast<uintptr_t>(at) % 4 == 0)
      packed = *reinterpret_cast<const uint32_t*>(at);
    else
      packed = at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
    Values<uint8_t, per_word> v;
#pragma unroll
    for (int i = 0; i < per_word; ++i) v.v[i] = packed >> (i * bits) & Bits<bits>::mask;
    if (count >= per_word && reinterpret_cast<uintptr_t>(codes) % per_word == 0) {
      store(codes, v);
    } else {
#pragma unroll
      for (int i = 0; i < per_word; ++i)
        if (i < count) codes[i] = v.v[i];
    }
  }
}

}  // namespace

void unpack(const UnpackArgs& a) {
  with_bits(a.bits, [&](auto bits) {
    const int64_t row_words =
        ceil_div(a.cols, 4 * Bits<bits>::per_byte);  // rows are padded, so a word is never cut off
    launch("unpack", unpack_kernel<bits>, ceil_div(a.rows * row_words, block_threads), a, row_words);
  });
}

}  // namespace qk::cuda
