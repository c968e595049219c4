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
};

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

// Where a lane's part of the first tile of a block of channels lies; past the outer group's last block that again.
template <int bits>
__device__ const uint8_t* weights_of(const Conv2dArgs& a, int64_t outer, int64_t block, int lane) {
  const PackedLayout& layout = a.layout;
  return a.weight + layout.codes_at + lane * Codes<bits>::lane_bytes +
         (outer * layout.blocks_per_outer + least(block, layout.blocks_per_outer - 1)) * layout.block_bytes;
}

// Launches for `op`, for no more than 32 tokens; false, and nothing done, where the shape is not for it.
bool convolve_few(const char* op, const Conv2dArgs& args);

}  // namespace qk::cuda
