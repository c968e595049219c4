// How the kernels of products for many tokens get codes of x into shared memory, and codes of the result out of it.
#pragma once
#include "cuda/product.cuh"

namespace qk::cuda {

constexpr int stages = 4;                           // pieces of tile_k codes of x on their way
constexpr int chunk = 16, chunks = tile_k / chunk;  // bytes of x that are copied, and read, together

// What a block makes: row_warps x token_warps warps, each row_tiles x 16 channels of token_tiles x 8 tokens.
template <int row_warps_, int row_tiles_, int token_tiles_>
struct Tile {
  static constexpr int row_warps = row_warps_, row_tiles = row_tiles_, token_tiles = token_tiles_;
  static constexpr int token_warps = warps / row_warps, blocks = row_warps * row_tiles, channels = blocks * rows;
  static constexpr int tokens = token_warps * token_tiles * 8;
  static constexpr int pitch = channels + 16;  // of a token's codes, gathered in shared memory
  static constexpr int shared = tokens * (stages * tile_k > pitch ? stages * tile_k : pitch);  // x, then such codes
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

// The codes of `count` tokens from token0 on, which lie gathered in x, to their rows of the result; part: of the outer
// group's channels. All threads of the block have written theirs.
template <class T>
__device__ void leave_rows(const Conv2dArgs& a, const uint8_t* x, int64_t token0, int count, int64_t outer,
                           int64_t part) {
  const PackedLayout& layout = a.layout;
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
}

}  // namespace qk::cuda
