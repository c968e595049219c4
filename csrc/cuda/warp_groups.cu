// Products of codes for many tokens on Hopper, as in convolve.cu: two groups of four warps, whose products go on while
// the next tile's weights are unpacked and codes of x come.
#include "cuda/warp_group.cuh"

namespace qk::cuda {
namespace {

// A group of four warps has channels of its own, or tokens.
template <class T, int bits>
__global__ void __launch_bounds__(block_threads, bits == 8 ? 2 : 1)
    warp_groups_kernel([[maybe_unused]] Conv2dArgs a, [[maybe_unused]] int64_t all_tokens,
                       [[maybe_unused]] int64_t tiles) {
#if defined(QK_WARP_GROUPS)
  __shared__ __align__(512) uint8_t x[T::shared];
  __shared__ int32_t x_sums[T::tokens];
  constexpr int stage_bytes = T::tokens * tile_k, steps = tile_k / step_k;
  constexpr int readers = block_threads / T::tokens;  // threads that add up a token's codes
  const PackedLayout& layout = a.layout;
  const Epilogue& e = a.epilogue;
  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % T::row_warps;
  // Of the group; the compiler sees that it is one number for all lanes.
  const int first_token = __shfl_sync(0xffffffffu, threadIdx.x / 32 / T::row_warps * (8 * T::token_tiles), 0);
  const int64_t parts = ceil_div(layout.blocks_per_outer, T::blocks);  // of an outer group's channels
  const int all_tiles = static_cast<int>(layout.segment_padded / tile_k);

  each_job<block_threads>(tiles * layout.outer * parts, [&](int64_t job) {
    const int64_t outer = job / parts % layout.outer, part = job % parts;
    const int64_t token0 = job / (parts * layout.outer) * T::tokens;
    const int count = least(T::tokens, all_tokens - token0);
    const auto block_of = [&](int r) { return part * T::blocks + row_warp * T::row_tiles + r; };  // in the outer group
    Loader<T, chunk> loader(a, token0, count, outer * a.shape.c);
    const uint8_t* weights[T::row_tiles];
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r) weights[r] = weights_of<bits>(a, outer, block_of(r), lane);
    Codes<bits> codes[T::row_tiles];  // of the next tile
    const auto read = [&](int tile) {
#pragma unroll
      for (int r = 0; r < T::row_tiles; ++r)
        if (tile < all_tiles) codes[r] = Codes<bits>::at(weights[r] + tile * tile_bytes(bits));
    };
    const auto copy = [&](int tile) {
      if (tile < all_tiles) loader.next(x + tile % stages * stage_bytes);
      end_batch();
    };
    __syncthreads();  // the last job's codes have left
    read(0);
    copy(0), copy(1);
    int32_t dot[T::row_tiles][T::token_tiles][4] = {};
    int32_t x_sum = 0;
    uint32_t factors[2][T::row_tiles][steps][4];  // of the products that go on, and of the next
    settle(dot);                                  // no product begins before it is 0

    const auto multiply_tile = [&](auto turn, int tile) {
      auto& now = factors[turn];
#pragma unroll
      for (int r = 0; r < T::row_tiles; ++r)
#pragma unroll
        for (int s = 0; s < steps; ++s) codes[r].factor(s, now[r][s]);
      read(tile + 1);
      wait_copies<1>();
      show_copies();
      __syncthreads();  // this stage is there for all, and the products of the last but one are done in all
      const uint8_t* stage = x + tile % stages * stage_bytes;
      begin_products(now);
#pragma unroll
      for (int s = 0; s < steps; ++s)
#pragma unroll
        for (int r = 0; r < T::row_tiles; ++r)
          multiply_group<bits == 8>(dot[r], now[r][s], stage + first_token * tile_k, s);
      end_products();
      copy(tile + 2);
      if constexpr (bits < 8)
#pragma unroll
        for (int i = 0; i < chunks / readers; ++i) {
          const int at = threadIdx.x % readers * (chunks / readers) + i;
          const auto words =
              load<4>(reinterpret_cast<const uint32_t*>(stage + place_in_stage(threadIdx.x / readers, at)));
          for (uint32_t word : words.v) x_sum = dot4(word, 0x01010101u, x_sum);
        }
      wait_products<1>();  // the factors of the last tile are free
    };
    int tile = 0;
    for (; tile + 1 < all_tiles; tile += 2) {
      multiply_tile(std::integral_constant<int, 0>{}, tile);
      multiply_tile(std::integral_constant<int, 1>{}, tile + 1);
    }
    if (tile < all_tiles) multiply_tile(std::integral_constant<int, 0>{}, tile);
    wait_products<0>(dot);

    for (int apart = 1; apart < readers; apart *= 2) x_sum += __shfl_xor_sync(0xffffffffu, x_sum, apart);
    if (threadIdx.x % readers == 0) x_sums[threadIdx.x / readers] = x_sum;
    __syncthreads();  // they are there, and x has been read: codes are gathered there, to leave as whole rows
    const bool to_codes = e.out_step != nullptr;
    // Read here, as registers are few before.
    const Ending ending(e);
    const float x_step = e.per_row ? 0 : *e.x_step;
    const int32_t x_zero = e.per_row ? 0 : *e.x_zero;
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t in_outer = block_of(r) * rows + lane / 4 + 8 * half;
        const Channel channel =
            channel_at<bits>(a, ending, outer * layout.blocks_per_outer + block_of(r), in_outer, outer, 0);
        if (channel.n < 0) continue;
#pragma unroll
        for (int c = 0; c < T::token_tiles; ++c)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int token = first_token + 8 * c + 2 * (lane % 4) + j;
            if (token >= count) continue;
            const int64_t row = token0 + token, at = row * a.shape.n + channel.n;
            const int32_t sum = exact_sum(dot[r][c][2 * half + j], channel, e.per_row ? e.x_zero[row] : x_zero,
                                          bits < 8 ? x_sums[token] : 0);
            float y = add_group(-0.0f, sum, e.per_row ? e.x_step[row] : x_step, channel.weight_step);
            y = ending.completed(y, channel.bias, at);
            if (to_codes)
              x[token * T::pitch + (row_warp * T::row_tiles + r) * rows + lane / 4 + 8 * half] = code_of(y, ending.out);
            else
              static_cast<float*>(a.out)[at] = y;
          }
      }
    if (!to_codes) return;
    __syncthreads();
    leave_rows<T>(a, x, token0, count, outer, part);
  });
#elif defined(__CUDA_ARCH__)
  __trap();  // convolve_on_warp_groups asks for the architecture
#endif
}

using Large = Tile<8, 2, 16>;   // 256 channels x 128 tokens
using Middle = Tile<8, 1, 16>;  // 128 x 128
using Narrow = Tile<4, 1, 8>;   // 64 x 128

}  // namespace

bool convolve_on_warp_groups(const char* op, const Conv2dArgs& a) {
  if (!has_warp_groups(op, reinterpret_cast<const void*>(&warp_groups_kernel<Middle, 8>))) return false;
  const int64_t tokens = a.batch * a.oh * a.ow, n = a.layout.n_per_outer;
  const auto blocks = [&](auto tile) {
    using T = decltype(tile);
    return ceil_div(tokens, T::tokens) * ceil_div(n, T::channels) * a.layout.outer;
  };
  const bool narrow = n <= Narrow::channels;
  // Not where more than an eighth of it would be for no channel.
  const bool whole = 8 * round_up(n, Large::channels) <= 9 * round_up(n, Middle::channels);
  const bool large = a.shape.bits < 8 && whole && blocks(Large{}) >= processors(op);
  if (!large && (narrow ? blocks(Narrow{}) : blocks(Middle{})) < processors(op)) return false;
  with_bits(a.shape.bits, [&](auto bits) {
    const auto run = [&](auto tile) {
      using T = decltype(tile);
      launch(op, warp_groups_kernel<T, bits>, blocks(tile), a, tokens, ceil_div(tokens, T::tokens));
    };
    if constexpr (bits < 8)
      if (large) return run(Large{});
    narrow ? run(Narrow{}) : run(Middle{});
  });
  return true;
}

}  // namespace qk::cuda
