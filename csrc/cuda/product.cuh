// What the kernels of products share: a lane's codes of a weight, and what the sums of a channel need.
#pragma once
#include "cuda/conv2d.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/warp.cuh"

namespace qk::cuda {

constexpr int warps = block_threads / 32, rows = PackedLayout::block;  // of a block; of a tile of the weight

// A lane's part of a tile of weights: `bits` words.
template <int bits>
struct Codes {
  static constexpr int words = bits, lane_bytes = bits == 2 ? 8 : 16;  // lanes lie so far apart
  uint32_t word[words];

  // tile: of the lane.
  __device__ static Codes at(const uint8_t* tile) {
    constexpr int together = bits < 4 ? bits : 4;
    Codes codes;
#pragma unroll
    for (int i = 0; i < words; i += together) {
      const auto found = load<together>(reinterpret_cast<const uint32_t*>(tile + i / together * 512));
#pragma unroll
      for (int j = 0; j < together; ++j) codes.word[i + j] = found.v[j];
    }
    return codes;
  }

  // The first factor of step `step` of the tile.
  __device__ void factor(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (bits == 8) a[i] = word[4 * step + i];
      if constexpr (bits == 4) a[i] = word[2 * step + i / 2] >> (4 * (i % 2)) & 0x0f0f0f0fu;
      if constexpr (bits == 2) a[i] = word[step] >> (2 * i) & 0x03030303u;
    }
  }

  // The first factor of the whole tile in codes of 4 bits. Which place of K a nibble has is for both factors to agree
  // on: nibble 2 b + e of a register of step s has 32 s + 16 e + 4 t + b.
  __device__ void factor_int4(uint32_t (&a)[4]) const {
    static_assert(bits < 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (bits == 4)
        a[i] = i % 2 ? (word[i / 2 * 2] >> 4 & 0x0f0f0f0fu) | (word[i / 2 * 2 + 1] & 0xf0f0f0f0u)
                     : (word[i / 2 * 2] & 0x0f0f0f0fu) | (word[i / 2 * 2 + 1] << 4 & 0xf0f0f0f0u);
      if constexpr (bits == 2) a[i] = word[i / 2] >> (2 * (i % 2)) & 0x33333333u;
    }
  }
};

// The second factor that goes with it: of a step, from bytes 4 t .. 4 t + 3 of its first 16 codes and of its last.
__device__ inline uint32_t joined_int4(uint32_t first, uint32_t last) {
  return (first & 0x0f0f0f0fu) | (last << 4 & 0xf0f0f0f0u);
}

// A channel of the result, and what its sums need.
struct Channel {
  int64_t n;  // or -1
  uint32_t zero, weight_sum;
  float weight_step, bias;
};

template <int bits>
__device__ Channel channel_at(const Conv2dArgs& a, const Ending& ending, int64_t block, int64_t in_outer, int64_t outer,
                              int64_t group) {
  const PackedLayout& layout = a.layout;
  if (in_outer >= layout.n_per_outer) return {-1, 0, 0, 0, 0};
  const int64_t n = outer * layout.n_per_outer + in_outer;
  const int64_t at = (block * layout.k_groups + group) * rows + in_outer % rows;
  return {n, bits < 8 ? a.weight[layout.zeros_at + at] : 0u,
          static_cast<uint32_t>(reinterpret_cast<const int32_t*>(a.weight + layout.sums_at)[at]),
          a.epilogue.weight_step[n * layout.k_groups + group], ending.bias_of(n)};
}

// sum (x - x_zero) (weight - zero) = dot - zero * sum x - x_zero * sum (weight - zero), modulo 2^32 on the way.
__device__ inline int32_t exact_sum(int32_t dot, const Channel& channel, int32_t x_zero, int32_t x_sum) {
  return static_cast<int32_t>(dot - channel.weight_sum * static_cast<uint32_t>(x_zero) -
                              channel.zero * static_cast<uint32_t>(x_sum));
}

// Where a lane's part of the first tile of a block of channels lies; past the outer group's last block that again.
template <int bits>
__device__ const uint8_t* weights_of(const Conv2dArgs& a, int64_t outer, int64_t block, int lane) {
  const PackedLayout& layout = a.layout;
  return a.weight + layout.codes_at + lane * Codes<bits>::lane_bytes +
         (outer * layout.blocks_per_outer + least(block, layout.blocks_per_outer - 1)) * layout.block_bytes;
}

// These launch for `op`; false, and nothing done, where shape or device are not for it. Few: no more than 32 tokens.
bool convolve_few(const char* op, const Conv2dArgs& args);
// Images of up to four channels.
bool convolve_first(const char* op, const Conv2dArgs& args);
// Channels must come in vectors of 16, and K be one group.
bool convolve_on_warp_groups(const char* op, const Conv2dArgs& args);

}  // namespace qk::cuda
