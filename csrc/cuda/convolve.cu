// Products of codes on tensor cores: rows of the result are output channels, columns are tokens (output pixels), so
// that weights go from memory to the registers of the instruction and no further, and one token wastes 7 of 8 columns.
#include "cuda/loader.cuh"

namespace qk::cuda {
namespace {

// What a warp has of the result; lane 4 g + t: channels g and g + 8, tokens 2 t and 2 t + 1 of each tile.
// int4: both factors have codes of 4 bits or less, and the device multiplies such ones.
template <class T, int bits, bool grouped, bool int4>
struct Sums {
  int32_t dot[T::row_tiles][T::token_tiles][4] = {};
  int32_t x_sum[T::token_tiles] = {};  // of codes of token g, this lane's part
  float y[grouped ? T::row_tiles : 1][grouped ? T::token_tiles : 1][4];

  // codes: the lane's. stage: of the block. first_token: the warp's.
  __device__ void add(const Codes<bits> (&codes)[T::row_tiles], const uint8_t* stage, int first_token) {
    constexpr int steps = int4 ? 1 : tile_k / step_k;
    uint32_t factors[T::row_tiles][steps][4];
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r) {
      if constexpr (int4)
        codes[r].factor_int4(factors[r][0]);
      else
#pragma unroll
        for (int s = 0; s < steps; ++s) codes[r].factor(s, factors[r][s]);
    }
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < T::token_tiles; ++c) {
      uint32_t x[chunks];
      load_matrices(x, stage + place_in_stage(first_token + 8 * c + lane % 8, lane / 8));
      if constexpr (bits < 8) {
#pragma unroll
        for (uint32_t part : x) x_sum[c] = dot4(part, 0x01010101u, x_sum[c]);
      }
      if constexpr (int4) {
        const uint32_t first = joined_int4(x[0], x[1]), last = joined_int4(x[2], x[3]);
#pragma unroll
        for (int r = 0; r < T::row_tiles; ++r) multiply_int4(dot[r][c], factors[r][0], first, last);
      } else {
#pragma unroll
        for (int s = 0; s < steps; ++s)
#pragma unroll
          for (int r = 0; r < T::row_tiles; ++r) multiply<bits == 8>(dot[r][c], factors[r][s], x[2 * s], x[2 * s + 1]);
      }
    }
  }

  // The sum of codes of each token of the warp is in all lanes of its g.
  __device__ void join() {
#pragma unroll
    for (int32_t& sum : x_sum)
      for (int apart = 1; apart < 4; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  }

  __device__ int32_t exact(int r, int c, int i, const Channel& channel, int32_t x_zero) const {
    int32_t codes = 0;
    if constexpr (bits < 8) codes = __shfl_sync(0xffffffffu, x_sum[c], 4 * (2 * (threadIdx.x % 4) + i % 2));
    return exact_sum(dot[r][c][i], channel, x_zero, codes);
  }
};

template <class T, int bits, int word, bool grouped, bool int4>
__global__ void __launch_bounds__(block_threads, grouped || T::row_tiles * T::token_tiles > 8 ? 1 : 2)
    convolve_kernel(Conv2dArgs a, int64_t all_tokens, int64_t tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (int4) return __trap();  // has_int4 asks for the architecture
#endif
  __shared__ __align__(16) uint8_t x[T::shared];
  constexpr int stage_bytes = T::tokens * tile_k;
  const PackedLayout& layout = a.layout;
  const Epilogue& e = a.epilogue;
  const Ending ending(e);
  const float x_step = e.per_row ? 0 : *e.x_step;
  const int32_t x_zero = e.per_row ? 0 : *e.x_zero;
  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % T::row_warps;
  const int first_token = threadIdx.x / 32 / T::row_warps * (8 * T::token_tiles);  // of the warp
  const int64_t parts = ceil_div(layout.blocks_per_outer, T::blocks);              // of an outer group's channels
  const int group_tiles = layout.segment_padded / tile_k, all_tiles = group_tiles * static_cast<int>(layout.k_groups);

  each_job<block_threads>(tiles * layout.outer * parts, [&](int64_t job) {
    const int64_t outer = job / parts % layout.outer, part = job % parts;
    const int64_t token0 = job / (parts * layout.outer) * T::tokens;
    const int count = least(T::tokens, all_tokens - token0);
    const auto block_of = [&](int r) { return part * T::blocks + row_warp * T::row_tiles + r; };  // in the outer group
    const bool works = block_of(0) < layout.blocks_per_outer;  // or there is nothing left for this warp
    Loader<T, word> loader(a, token0, count, outer * a.shape.c);
    const uint8_t* weights[T::row_tiles];
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r) weights[r] = weights_of<bits>(a, outer, block_of(r), lane);
    __syncthreads();  // the last job's stages have been read
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) {
      if (i < all_tiles) loader.next(x + i * stage_bytes);
      end_batch();
    }
    Sums<T, bits, grouped, int4> sums;
    if constexpr (grouped)
      for (auto& row : sums.y)
        for (auto& column : row)
          for (float& value : column) value = -0.0f;  // leaves the first group's sum alone
    Codes<bits> now[T::row_tiles], next[T::row_tiles];
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r) now[r] = Codes<bits>::at(weights[r]);

    // f(channel, r, c, i, token, y) for each result of the lane, with the sums of one more group.
    const auto each_result = [&](int64_t group, const auto& f) {
      sums.join();
#pragma unroll
      for (int r = 0; r < T::row_tiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t in_outer = block_of(r) * rows + lane / 4 + 8 * half;
          const Channel channel =
              channel_at<bits>(a, ending, outer * layout.blocks_per_outer + block_of(r), in_outer, outer, group);
#pragma unroll
          for (int c = 0; c < T::token_tiles; ++c)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int token = first_token + 8 * c + 2 * (lane % 4) + j, i = 2 * half + j;
              const int64_t at = token0 + least(token, count - 1);
              const int32_t sum = sums.exact(r, c, i, channel, e.per_row ? e.x_zero[at] : x_zero);
              const float before = grouped ? sums.y[grouped ? r : 0][grouped ? c : 0][i] : -0.0f;
              f(channel, r, c, i, token,
                add_group(before, sum, e.per_row ? e.x_step[at] : x_step, channel.weight_step));
            }
        }
    };

    int64_t group = 0;
    for (int tile = 0; tile < all_tiles; ++tile) {
      wait_copies<stages - 2>();
      __syncthreads();  // the stage is there for all, and the one before it has been read by all
      if (tile + stages - 1 < all_tiles) loader.next(x + (tile + stages - 1) % stages * stage_bytes);
      end_batch();
#pragma unroll
      for (int r = 0; r < T::row_tiles; ++r)
        if (tile + 1 < all_tiles) next[r] = Codes<bits>::at(weights[r] += tile_bytes(bits));
      if (works) sums.add(now, x + tile % stages * stage_bytes, first_token);
#pragma unroll
      for (int r = 0; r < T::row_tiles; ++r) now[r] = next[r];
      if constexpr (grouped) {
        if ((tile + 1) % group_tiles || tile + 1 == all_tiles) continue;  // the last one's results leave at once
        each_result(group, [&](const Channel&, int r, int c, int i, int, float y) {
          sums.y[r][c][i] = y;
          sums.dot[r][c][i] = 0;
        });
#pragma unroll
        for (int32_t& sum : sums.x_sum) sum = 0;
        ++group;
      }
    }

    const bool codes = e.out_step != nullptr;
    if (codes) __syncthreads();  // x has been read: codes are gathered there, to leave as whole rows
    const auto put = [&](const Channel& channel, int r, int, int i, int token, float y) {
      if (channel.n < 0 || token >= count) return;
      const int64_t at = (token0 + token) * a.shape.n + channel.n;
      y = ending.completed(y, channel.bias, at);
      if (codes)
        x[token * T::pitch + (row_warp * T::row_tiles + r) * rows + lane / 4 + 8 * (i / 2)] = code_of(y, ending.out);
      else
        static_cast<float*>(a.out)[at] = y;
    };
    each_result(layout.k_groups - 1, put);
    if (!codes) return;
    __syncthreads();
    leave_rows<T>(a, x, token0, count, outer, part);
  });
}

using Large = Tile<4, 2, 8>;   // 128 channels x 128 tokens
using Middle = Tile<4, 1, 4>;  // 64 x 64
using Few = Tile<8, 1, 2>;     // 128 x 16
using Narrow = Tile<1, 1, 2>;  // 16 x 128

}  // namespace

void convolve(const char* op, const Conv2dArgs& a) {
  check_aligned(op, "weight", a.weight, 16);
  if (convolve_few(op, a) || convolve_first(op, a)) return;
  const int64_t tokens = a.batch * a.oh * a.ow, n = a.layout.n_per_outer;
  const auto whole = [&](int word) {
    return a.shape.c % word == 0 && a.layout.segment_k % word == 0 && reinterpret_cast<uintptr_t>(a.x) % word == 0;
  };
  with_bits(a.shape.bits, [&](auto bits) {
    const auto run = [&](auto tile, auto word, auto grouped, auto int4) {
      using T = decltype(tile);
      const int64_t tiles = ceil_div(tokens, T::tokens);
      launch(op, convolve_kernel<T, bits, word, grouped, int4>,
             tiles * a.layout.outer * ceil_div(a.layout.blocks_per_outer, T::blocks), a, tokens, tiles);
    };
    constexpr std::integral_constant<int, 16> sixteen;
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (a.layout.k_groups > 1) {
      const auto by_word = [&](auto tile) { whole(16) ? run(tile, sixteen, yes, no) : run(tile, one, yes, no); };
      return tokens <= Few::tokens ? by_word(Few{}) : by_word(Middle{});
    }
    const auto by_word = [&](auto tile) {
      whole(16) ? run(tile, sixteen, no, no) : whole(4) ? run(tile, four, no, no) : run(tile, one, no, no);
    };
    if (tokens <= Few::tokens) return by_word(Few{});
    if (n <= Narrow::channels) return by_word(Narrow{});
    if (whole(16) && convolve_on_warp_groups(op, a)) return;
    // Large tiles read x and weights half as often, where there are enough for every processor.
    const int64_t blocks = ceil_div(tokens, Large::tokens) * ceil_div(n, Large::channels) * a.layout.outer;
    const bool large = blocks >= processors(op) && whole(16);
    if constexpr (bits < 8)
      if (a.epilogue.x_bits <= 4 && whole(16) && has_int4(op))
        return large ? run(Large{}, sixteen, no, yes) : run(Middle{}, sixteen, no, yes);
    large ? run(Large{}, sixteen, no, no) : by_word(Middle{});
  });
}

}  // namespace qk::cuda
