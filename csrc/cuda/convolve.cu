// Products of codes on tensor cores: rows of the result are output channels, columns are tokens (output pixels), so
// that weights go from memory to the registers of the instruction and no further, and one token wastes 7 of 8 columns.
#include "cuda/conv2d.cuh"
#include "cuda/product.cuh"

namespace qk::cuda {
namespace {

constexpr int stages = 4;                           // pieces of tile_k codes of x on their way
constexpr int chunk = 16, chunks = tile_k / chunk;  // bytes of x that are copied, and read, together

// What a block makes: row_warps x token_warps warps, each row_tiles x 16 channels of token_tiles x 8 tokens.
template <int row_warps_, int row_tiles_, int token_tiles_>
struct Tile {
  static constexpr int row_warps = row_warps_, row_tiles = row_tiles_, token_tiles = token_tiles_;
  static constexpr int token_warps = warps / row_warps, blocks = row_warps * row_tiles, channels = blocks * rows;
  static constexpr int tokens = token_warps * token_tiles * 8;
  static constexpr int pitch = channels + 16;  // of a token's codes, gathered in shared memory
  static constexpr int shared = stages * tokens * tile_k;
  static_assert(tokens * pitch <= shared, "codes of the result fit where x was");
};

// Byte of a chunk of a token's codes in a stage. Eight tokens lie in eight groups of banks, whatever the chunk.
QK_HD constexpr int place_in_stage(int token, int at) { return token * tile_k + (at ^ (token / 2 % chunks)) * chunk; }

// Copies of x: each thread has one chunk of every 64th token, the same windows for all stages. word: bytes that are
// copied together.
template <class T, int word>
struct Loader {
  static constexpr int apart = block_threads / chunks, each = (T::tokens + apart - 1) / apart;
  const Conv2dArgs& a;
  Window windows[each];
  bool present[each];
  const uint8_t* pixels[each];  // of the next stage's tap, where a chunk is of one
  uint32_t zeros;               // four codes zero
  Place place;                  // of this thread's chunk in the next stage
  int32_t left;                 // codes of the group in the next stage and after

  __device__ Loader(const Conv2dArgs& args, int64_t token0, int count, int64_t channel) : a(args) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int token = threadIdx.x / chunks + i * apart;
      present[i] = token < count;
      windows[i] = present[i] ? window_of(a, token0 + token, channel) : Window{};
    }
    zeros = padding_of(a);
    left = static_cast<int32_t>(a.layout.segment_k);
    if (a.shape.c) place.advance(a, threadIdx.x % chunks * chunk);
    find();
  }

  // The next stage, to `stage`. What lies past the group's end, or is no token, is 0.
  __device__ void next(uint8_t* stage) {
    // Codes of the group in this thread's chunk, or more.
    const int32_t mine = left - static_cast<int32_t>(threadIdx.x % chunks * chunk);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int token = threadIdx.x / chunks + i * apart;
      if (T::tokens % apart && token >= T::tokens) break;
      uint8_t* to = stage + place_in_stage(token, threadIdx.x % chunks);
      if constexpr (word == chunk) {
        copy(to, mine > 0 && present[i], pixels[i] ? pixels[i] + place.channel : nullptr);
      } else {
        Place at = place;
        Values<uint8_t, chunk> bytes{};
#pragma unroll
        for (int j = 0; j < chunk; j += word, at.advance(a, word)) {
          const bool inside = present[i] && j < mine;
          const uint8_t* from = inside ? source_of(a, windows[i], at) : nullptr;
          if constexpr (word > 1)
            copy(to + j, inside, from);
          else
            bytes.v[j] = from ? *from : static_cast<uint8_t>(inside ? zeros : 0);
        }
        if constexpr (word == 1) store(to, bytes);
      }
    }
    const int32_t by = left < tile_k ? left : tile_k;  // groups follow each other without gaps
    if (place.advance(a, by)) find();
    left -= by;
    if (!left) left = static_cast<int32_t>(a.layout.segment_k);
  }

  __device__ void find() {
    if constexpr (word == chunk)
#pragma unroll
      for (int i = 0; i < each; ++i) pixels[i] = present[i] ? pixel_of(a, windows[i], place) : nullptr;
  }

  // A word, from memory or of the code zero where it is inside, else 0.
  __device__ void copy(uint8_t* to, bool inside, const uint8_t* from) const {
    if (inside && from) return copy_async<word>(to, from);
    Values<uint32_t, word / 4> values;
    for (uint32_t& one : values.v) one = inside ? zeros : 0;
    store(reinterpret_cast<uint32_t*>(to), values);
  }
};

// What a warp has of the result; lane 4 g + t: channels g and g + 8, tokens 2 t and 2 t + 1 of each tile.
template <class T, int bits, bool grouped>
struct Sums {
  int32_t dot[T::row_tiles][T::token_tiles][4] = {};
  int32_t x_sum[T::token_tiles] = {};  // of codes of token g, this lane's part
  float y[grouped ? T::row_tiles : 1][grouped ? T::token_tiles : 1][4];

  // codes: the lane's. stage: of the block. first_token: the warp's.
  __device__ void add(const Codes<bits> (&codes)[T::row_tiles], const uint8_t* stage, int first_token) {
    uint32_t factors[T::row_tiles][tile_k / step_k][4];
#pragma unroll
    for (int r = 0; r < T::row_tiles; ++r)
#pragma unroll
      for (int s = 0; s < tile_k / step_k; ++s) codes[r].factor(s, factors[r][s]);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < T::token_tiles; ++c) {
      uint32_t x[chunks];
      load_matrices(x, stage + place_in_stage(first_token + 8 * c + lane % 8, lane / 8));
      if constexpr (bits < 8) {
#pragma unroll
        for (uint32_t part : x) x_sum[c] = dot4(part, 0x01010101u, x_sum[c]);
      }
#pragma unroll
      for (int s = 0; s < tile_k / step_k; ++s)
#pragma unroll
        for (int r = 0; r < T::row_tiles; ++r) multiply<bits == 8>(dot[r][c], factors[r][s], x[2 * s], x[2 * s + 1]);
    }
  }

  // The sum of codes of each token of the warp is in all lanes of its g.
  __device__ void join() {
#pragma unroll
    for (int32_t& sum : x_sum)
      for (int apart = 1; apart < 4; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  }

  // sum (x - x_zero) (weight - zero) = dot - zero * sum x - x_zero * sum (weight - zero), modulo 2^32 on the way.
  __device__ int32_t exact(int r, int c, int i, uint32_t zero, uint32_t weight_sum, int32_t x_zero) const {
    uint32_t sum = dot[r][c][i] - weight_sum * static_cast<uint32_t>(x_zero);
    if constexpr (bits < 8) sum -= zero * __shfl_sync(0xffffffffu, x_sum[c], 4 * (2 * (threadIdx.x % 4) + i % 2));
    return static_cast<int32_t>(sum);
  }
};

template <class T, int bits, int word, bool grouped>
__global__ void __launch_bounds__(block_threads, grouped || T::row_tiles * T::token_tiles > 8 ? 1 : 2)
    convolve_kernel(Conv2dArgs a, int64_t all_tokens, int64_t tiles) {
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
    Sums<T, bits, grouped> sums;
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
              const int32_t sum =
                  sums.exact(r, c, i, channel.zero, channel.weight_sum, e.per_row ? e.x_zero[at] : x_zero);
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
    const int64_t first = part * T::channels;  // of the outer group
    const int length = least(T::channels, layout.n_per_outer - first);
    uint8_t* out = static_cast<uint8_t*>(a.out) + token0 * a.shape.n + outer * layout.n_per_outer + first;
    const auto leave = [&](auto bytes) {
      for (int i = threadIdx.x; i < count * (length / bytes); i += block_threads) {
        const int token = i / (length / bytes), at = i % (length / bytes) * bytes;
        store(out + token * a.shape.n + at, load<bytes>(x + token * T::pitch + at));
      }
    };
    if (length % 16 == 0 && a.shape.n % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0)
      leave(std::integral_constant<int, 16>{});
    else
      leave(std::integral_constant<int, 1>{});
  });
}

using Large = Tile<4, 2, 8>;   // 128 channels x 128 tokens
using Middle = Tile<4, 1, 4>;  // 64 x 64
using Few = Tile<8, 1, 2>;     // 128 x 16
using Narrow = Tile<1, 1, 2>;  // 16 x 128

}  // namespace

void convolve(const char* op, const Conv2dArgs& a) {
  check_aligned(op, "weight", a.weight, 16);
  if (convolve_few(op, a)) return;
  const int64_t tokens = a.batch * a.oh * a.ow, n = a.layout.n_per_outer;
  const auto whole = [&](int word) {
    return a.shape.c % word == 0 && a.layout.segment_k % word == 0 && reinterpret_cast<uintptr_t>(a.x) % word == 0;
  };
  with_bits(a.shape.bits, [&](auto bits) {
    const auto run = [&](auto tile, auto word, auto grouped) {
      using T = decltype(tile);
      const int64_t tiles = ceil_div(tokens, T::tokens);
      launch(op, convolve_kernel<T, bits, word, grouped>,
             tiles * a.layout.outer * ceil_div(a.layout.blocks_per_outer, T::blocks), a, tokens, tiles);
    };
    constexpr std::integral_constant<int, 16> sixteen;
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 1> one;
    if (a.layout.k_groups > 1) {
      const auto by_word = [&](auto tile) {
        whole(16) ? run(tile, sixteen, std::true_type{}) : run(tile, one, std::true_type{});
      };
      return tokens <= Few::tokens ? by_word(Few{}) : by_word(Middle{});
    }
    const auto by_word = [&](auto tile) {
      whole(16)  ? run(tile, sixteen, std::false_type{})
      : whole(4) ? run(tile, four, std::false_type{})
                 : run(tile, one, std::false_type{});
    };
    if (tokens <= Few::tokens) return by_word(Few{});
    if (n <= Narrow::channels) return by_word(Narrow{});
    // Large tiles read x and weights half as often, where there are enough for every processor.
    const int64_t large = ceil_div(tokens, Large::tokens) * ceil_div(n, Large::channels) * a.layout.outer;
    if (large >= processors(op) && whole(16)) return run(Large{}, sixteen, std::false_type{});
    by_word(Middle{});
  });
}

}  // namespace qk::cuda
