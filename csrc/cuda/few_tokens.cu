// Products of codes for a few tokens, which reading the weights decides: a warp keeps several tiles of them on their
// way from memory to the registers of the instruction, and the warps of a block share K, so that even few channels have
// many readers. x is read as it is needed: it is small, and stays in the caches.
#include "cuda/product.cuh"

namespace qk::cuda {
namespace {

// What a block makes: row_tiles x 16 channels of token_tiles x 8 tokens. depth: tiles of K that a warp has on their
// way.
template <int row_tiles_, int token_tiles_, int depth_>
struct Shape {
  static constexpr int row_tiles = row_tiles_, token_tiles = token_tiles_, depth = depth_;
  static constexpr int channels = row_tiles * rows, tokens = token_tiles * 8;
};

// A warp's way through K: every `warps`-th tile. Channels come in whole tiles, so that each is of one tap.
template <class S, int bits>
struct Reader {
  struct Part {
    Codes<bits> codes[S::row_tiles];
    uint32_t x[S::token_tiles][4];
  };

  const Conv2dArgs& a;
  Window windows[S::token_tiles];         // of token g of each tile of tokens; past the last one that again
  const uint8_t* pixels[S::token_tiles];  // this lane's first word of the next tile's tap, or null in the padding
  const uint8_t* weights[S::row_tiles];
  uint32_t zeros;  // four codes zero
  Place place;
  int tiles;  // left

  __device__ Reader(const Conv2dArgs& args, int64_t token0, int count, int64_t outer, int64_t block0) : a(args) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    zeros = padding_of(a);
    tiles = ceil_div(a.layout.segment_padded / tile_k - warp, warps);
#pragma unroll
    for (int c = 0; c < S::token_tiles; ++c)
      windows[c] = window_of(a, token0 + least(8 * c + lane / 4, count - 1), outer * a.shape.c);
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r)
      weights[r] = weights_of<bits>(a, outer, block0 + r, lane) + warp * tile_bytes(bits);
    if (tiles > 0) place.advance(a, warp * tile_k);
    find();
  }

  __device__ void find() {
#pragma unroll
    for (int c = 0; c < S::token_tiles; ++c) {
      pixels[c] = pixel_of(a, windows[c], place);
      if (pixels[c]) pixels[c] += 4 * (threadIdx.x % 4);
    }
  }

  __device__ void read(Part& part) {
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) {
      part.codes[r] = Codes<bits>::at(weights[r]);
      weights[r] += warps * tile_bytes(bits);
    }
#pragma unroll
    for (int c = 0; c < S::token_tiles; ++c) {
#pragma unroll
      for (uint32_t& x : part.x[c]) x = zeros;
      if (pixels[c]) {
        const auto* words = reinterpret_cast<const uint32_t*>(pixels[c] + place.channel);
#pragma unroll
        for (int m = 0; m < 4; ++m) part.x[c][m] = words[4 * m];
      }
    }
    if (--tiles > 0 && place.advance(a, warps * tile_k)) find();
  }
};

template <class S, int bits>
__global__ void __launch_bounds__(block_threads, S::row_tiles* S::token_tiles == 1 ? 2 : 1)
    few_tokens_kernel(Conv2dArgs a, int64_t all_tokens) {
  __shared__ int32_t sums[S::tokens][S::channels + 1];
  __shared__ int32_t x_sums[S::tokens];
  const PackedLayout& layout = a.layout;
  const Epilogue& e = a.epilogue;
  const Ending ending(e);
  const int lane = threadIdx.x % 32;
  const int64_t parts = ceil_div(layout.blocks_per_outer, S::row_tiles);  // of an outer group's channels
  const int64_t token_parts = ceil_div(all_tokens, S::tokens);

  each_job<block_threads>(token_parts * layout.outer * parts, [&](int64_t job) {
    const int64_t part = job % parts, outer = job / parts % layout.outer;
    const int64_t token0 = job / (parts * layout.outer) * S::tokens;
    const int count = least(S::tokens, all_tokens - token0);
    for (int i = threadIdx.x; i < S::tokens * (S::channels + 1); i += block_threads) (&sums[0][0])[i] = 0;
    if (threadIdx.x < S::tokens) x_sums[threadIdx.x] = 0;
    __syncthreads();

    Reader<S, bits> reader(a, token0, count, outer, part * S::row_tiles);
    typename Reader<S, bits>::Part ahead[S::depth];
    int tiles = reader.tiles;
    int32_t dot[S::row_tiles][S::token_tiles][4] = {};
    int32_t x_sum[S::token_tiles] = {};
#pragma unroll
    for (int i = 0; i < S::depth; ++i)
      if (reader.tiles > 0) reader.read(ahead[i]);
    for (; tiles > 0; tiles -= S::depth) {
#pragma unroll
      for (int i = 0; i < S::depth; ++i) {
        if (i >= tiles) break;
#pragma unroll
        for (int c = 0; c < S::token_tiles; ++c)
          if constexpr (bits < 8)
#pragma unroll
            for (uint32_t x : ahead[i].x[c]) x_sum[c] = dot4(x, 0x01010101u, x_sum[c]);
#pragma unroll
        for (int r = 0; r < S::row_tiles; ++r)
#pragma unroll
          for (int s = 0; s < tile_k / step_k; ++s) {
            uint32_t factor[4];
            ahead[i].codes[r].factor(s, factor);
#pragma unroll
            for (int c = 0; c < S::token_tiles; ++c)
              multiply<bits == 8>(dot[r][c], factor, ahead[i].x[c][2 * s], ahead[i].x[c][2 * s + 1]);
          }
        if (reader.tiles > 0) reader.read(ahead[i]);
      }
    }
#pragma unroll
    for (int c = 0; c < S::token_tiles; ++c) {
      if (bits < 8) atomicAdd(&x_sums[8 * c + lane / 4], x_sum[c]);  // integers: any order
#pragma unroll
      for (int r = 0; r < S::row_tiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          atomicAdd(&sums[8 * c + 2 * (lane % 4) + i % 2][16 * r + lane / 4 + 8 * (i / 2)], dot[r][c][i]);
    }
    __syncthreads();

    for (int i = threadIdx.x; i < count * S::channels; i += block_threads) {
      const int token = i / S::channels, at = i % S::channels;
      const int64_t block = part * S::row_tiles + at / rows;
      const Channel channel =
          channel_at<bits>(a, ending, outer * layout.blocks_per_outer + block, block * rows + at % rows, outer, 0);
      if (channel.n < 0) continue;
      const int64_t row = token0 + token, place = row * a.shape.n + channel.n;
      const int32_t x_zero = e.per_row ? e.x_zero[row] : *e.x_zero;
      const float x_step = e.per_row ? e.x_step[row] : *e.x_step;
      const int32_t sum = exact_sum(sums[token][at], channel, x_zero, x_sums[token]);
      const float y = add_group(-0.0f, sum, x_step, channel.weight_step);
      ending.put(a.out, place, ending.completed(y, channel.bias, place));
    }
    __syncthreads();  // the sums have been read
  });
}

}  // namespace

bool convolve_few(const char* op, const Conv2dArgs& a) {
  const int64_t tokens = a.batch * a.oh * a.ow;
  const bool whole = a.shape.c % tile_k == 0 && reinterpret_cast<uintptr_t>(a.x) % 4 == 0;
  if (tokens > 32 || a.layout.k_groups > 1 || !whole) return false;
  with_bits(a.shape.bits, [&](auto bits) {
    const auto run = [&](auto shape) {
      using S = decltype(shape);
      launch(op, few_tokens_kernel<S, bits>,
             ceil_div(tokens, S::tokens) * a.layout.outer * ceil_div(a.layout.blocks_per_outer, S::row_tiles), a,
             tokens);
    };
    if (tokens <= 8) return run(Shape<1, 1, 4>{});
    // Each block reads all of x: with 64 channels that is a quarter as often, where three of four processors get one.
    const bool many = 4 * ceil_div(a.layout.blocks_per_outer, 4) * a.layout.outer >= 3 * processors(op);
    if (tokens <= 16) return many ? run(Shape<4, 2, 2>{}) : run(Shape<1, 2, 4>{});
    // Two tiles of bytes on their way would not fit into the registers.
    many ? run(Shape<4, 4, decltype(bits)::value == 8 ? 1 : 2>{}) : run(Shape<1, 4, 2>{});
  });
  return true;
}

}  // namespace qk::cuda
