// Activations in float times weights of few bits on tensor cores: rows of the result are output channels, columns are
// tokens, as in products of codes (product.cuh), and the weights lie as for those. The instruction takes 16 values of
// K: those of a lane are 4 t .. 4 t + 3, in the weight as in x, so that it reads four neighbours at once. Codes become
// float16 or bfloat16 by their bits: code | 0x6400 is 1024 + code, code | 0x4300 is 128 + code, and a subtraction
// leaves code - zero, exactly. A float32 is the sum of three bfloat16, exactly from 2^-109 on (below, but for less than
// 2^-133), each of which is multiplied.
#include "ops/gemm_weight_only.h"

#include "cuda/product.cuh"

namespace qk::cuda {
namespace {

constexpr int steps = tile_k / 16;  // of a tile of the weight, by the instruction

// What x is in memory; four neighbours of it in registers; and the pairs that are multiplied, `parts` for each of x.
template <class T>
struct Halves {
  using Memory = T;
  using Four = Values<uint32_t, 2>;
  static constexpr int parts = 1;

  __device__ static Four four(const Memory* p) { return load<2>(reinterpret_cast<const uint32_t*>(p)); }
  __device__ static void set(Four& four, int i, Memory value) {
    four.v[i / 2] |= static_cast<uint32_t>(value.bits) << (16 * (i % 2));
  }
};
struct Float16 : Halves<Half> {
  static constexpr bool bfloat16 = false;
};
struct BFloat16 : Halves<BFloat> {
  static constexpr bool bfloat16 = true;
};
struct Float32 {
  using Memory = float;
  using Four = Values<float, 4>;
  static constexpr bool bfloat16 = true;
  static constexpr int parts = 3;

  __device__ static Four four(const Memory* p) { return load<4>(p); }
  __device__ static void set(Four& four, int i, Memory value) { four.v[i] = value; }
};

// The second factors of four neighbours, for each part that x is a sum of.
template <class T>
struct Factors {
  uint32_t b[T::parts][2];

  __device__ explicit Factors(const typename T::Four& x) {
    if constexpr (T::parts == 1) {
      b[0][0] = x.v[0], b[0][1] = x.v[1];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float rest = x.v[i];
#pragma unroll
        for (int part = 0; part < T::parts; ++part) {
          const uint32_t upper = __float_as_uint(rest) >> 16;  // the last part has no lower half
          b[part][i / 2] = i % 2 ? b[part][i / 2] | upper << 16 : upper;
          const float taken = __uint_as_float(upper << 16);
          rest = taken == rest ? 0 : __fadd_rn(rest, -taken);  // not infinity less infinity
        }
      }
    }
  }
};

// What is added to the bits of codes to leave code - zero: twice -(1024 + zero) or -(128 + zero).
template <bool bfloat16, int bits>
__device__ uint32_t less_zero(const GemmWeightOnlyArgs& a, int64_t at) {
  const uint32_t zero = bits == 8 ? 128 : a.weight[a.layout.zeros_at + at];
  return ((bfloat16 ? 0xc300u : 0xe400u) | zero) * 0x10001u;
}

// The first factor of a step from a lane's codes: four of channel g and four of channel g + 8.
template <bool bfloat16, int bits>
__device__ void weights_of_codes(uint32_t (&a)[4], const uint32_t (&codes)[2], const uint32_t (&less)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = codes[i % 2];
    const auto pair = [i](uint32_t bytes, uint32_t upper) {
      return i < 2 ? bytes_of<0, 4, 1, 4>(bytes, upper) : bytes_of<2, 4, 3, 4>(bytes, upper);
    };
    if constexpr (bits == 8 && bfloat16)  // 7 bits fit behind 128; a code below 0 has 256 taken away
      a[i] = add_halves<true>(pair(word & 0x7f7f7f7fu, 0x43), pair(word & 0x80808080u, 0xc3));
    else if constexpr (bits == 8)
      a[i] = add_halves<false>(pair(word ^ 0x80808080u, 0x64), less[i % 2]);
    else
      a[i] = add_halves<bfloat16>(pair(word, bfloat16 ? 0x43 : 0x64), less[i % 2]);
  }
}

// What a lane needs of the channels g and g + 8 of a block, in a group of K. Past the last block that again.
template <class T, int bits>
__device__ void enter_group(const GemmWeightOnlyArgs& a, int64_t block, int64_t group, uint32_t (&less)[2],
                            float (&step)[2]) {
  block = least(block, a.layout.blocks_per_outer - 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t in_block = threadIdx.x % 32 / 4 + 8 * half, n = least(block * rows + in_block, a.shape.n - 1);
    less[half] = less_zero<T::bfloat16, bits>(a, (block * a.layout.k_groups + group) * rows + in_block);
    step[half] = a.weight_step[n * a.layout.k_groups + group];
  }
}

// dot += the products of a step.
template <class T, int row_tiles>
__device__ void multiply_step(float (&dot)[row_tiles][4], const uint32_t (&weights)[row_tiles][4],
                              const Factors<T>& x) {
#pragma unroll
  for (int r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int part = T::parts; part-- > 0;)  // small ones first
      multiply_halves<T::bfloat16>(dot[r], weights[r], x.b[part][0], x.b[part][1]);
}

// f(c, r, j) for each sum of a lane: token 2 t + j % 2 of tile c of tokens, channel g + 8 (j / 2) of tile r of rows.
template <class S, class F>
__device__ void each_sum(const F& f) {
#pragma unroll
  for (int c = 0; c < S::token_tiles; ++c)
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) f(c, r, j);
}

// The first factors of step s for every tile of rows of a warp.
template <class T, int bits, int row_tiles>
__device__ void weights_of_step(uint32_t (&weights)[row_tiles][4], const Codes<bits> (&codes)[row_tiles],
                                const uint32_t (&less)[row_tiles][2], int s) {
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
    uint32_t factor[4];
    codes[r].factor(s / 2, factor);
    const uint32_t two[2] = {factor[s % 2 * 2], factor[s % 2 * 2 + 1]};
    weights_of_codes<T::bfloat16, bits>(weights[r], two, less[r]);
  }
}

template <int bits>
__device__ const uint8_t* weights_of_block(const GemmWeightOnlyArgs& a, int64_t block) {
  return a.weight + a.layout.codes_at + threadIdx.x % 32 * Codes<bits>::lane_bytes +
         least(block, a.layout.blocks_per_outer - 1) * a.layout.block_bytes;
}

// --- few tokens: reading the weights decides. The warps of a block share K; each reads x as it is needed. ---

template <class T, int row_tiles_, int token_tiles_, int depth_>
struct Shape {
  using Type = T;
  static constexpr int row_tiles = row_tiles_, token_tiles = token_tiles_, depth = depth_;
  static constexpr int channels = row_tiles * rows, tokens = token_tiles * 8;
};

// A warp's way through K: every `warps`-th tile of 64. word: values of x that are read together, 4 or 1.
template <class S, int bits, int word>
struct Reader {
  using T = typename S::Type;
  struct Part {
    Codes<bits> codes[S::row_tiles];
    typename T::Four x[S::token_tiles][steps];
    int group;
  };

  const GemmWeightOnlyArgs& a;
  const typename T::Memory* x[S::token_tiles];  // token g of each tile of tokens; past the last one that again
  const uint8_t* weights[S::row_tiles];
  int group_tiles, tiles;  // of a group; those left for this warp
  int group, tile;         // of the next tile; its place in the group

  __device__ Reader(const GemmWeightOnlyArgs& args, int64_t token0, int count, int64_t block0) : a(args) {
    const int warp = threadIdx.x / 32;
    group_tiles = static_cast<int>(a.layout.segment_padded / tile_k);
    tiles = ceil_div(group_tiles * a.layout.k_groups - warp, warps);
    group = warp / group_tiles, tile = warp % group_tiles;
#pragma unroll
    for (int c = 0; c < S::token_tiles; ++c)
      x[c] = static_cast<const typename T::Memory*>(a.x) +
             (token0 + least(8 * c + threadIdx.x % 32 / 4, count - 1)) * a.layout.k;
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) weights[r] = weights_of_block<bits>(a, block0 + r) + warp * tile_bytes(bits);
  }

  __device__ void read(Part& part) {
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) {
      part.codes[r] = Codes<bits>::at(weights[r]);
      weights[r] += warps * tile_bytes(bits);
    }
    part.group = group;
    const auto length = static_cast<int32_t>(a.layout.segment_k);
    const int64_t begin = int64_t{group} * length;
#pragma unroll
    for (int s = 0; s < steps; ++s) {
      const int32_t at = tile * tile_k + 16 * s + 4 * (threadIdx.x % 4);
#pragma unroll
      for (int c = 0; c < S::token_tiles; ++c) {
        typename T::Four values{};
        if constexpr (word == 4) {
          if (at < length) values = T::four(x[c] + begin + at);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (at + i < length) T::set(values, i, x[c][begin + at + i]);
        }
        part.x[c][s] = values;
      }
    }
    --tiles;
    tile += warps;
    while (tile >= group_tiles) tile -= group_tiles, ++group;
  }
};

template <class S, int bits, int word>
__global__ void __launch_bounds__(block_threads, S::tokens == 8 && S::Type::parts == 1 ? 2 : 1)
    few_rows_kernel(GemmWeightOnlyArgs a) {
  using T = typename S::Type;
  __shared__ float sums[S::tokens][S::channels + 1];
  const int lane = threadIdx.x % 32;
  const int64_t parts = ceil_div(a.layout.blocks_per_outer, S::row_tiles);

  each_job<block_threads>(ceil_div(a.m, S::tokens) * parts, [&](int64_t job) {
    const int64_t part = job % parts, token0 = job / parts * S::tokens, block0 = part * S::row_tiles;
    const int count = static_cast<int>(least(S::tokens, a.m - token0));
    Reader<S, bits, word> reader(a, token0, count, block0);
    typename Reader<S, bits, word>::Part ahead[S::depth];
    int tiles = reader.tiles;
    float y[S::token_tiles][S::row_tiles][4] = {};
    uint32_t less[S::row_tiles][2];
    float step[S::row_tiles][2];
    int group = -1;
#pragma unroll
    for (int i = 0; i < S::depth; ++i)
      if (reader.tiles > 0) reader.read(ahead[i]);
    for (; tiles > 0; tiles -= S::depth) {
#pragma unroll
      for (int i = 0; i < S::depth; ++i) {
        if (i >= tiles) break;
        if (ahead[i].group != group) {
          group = ahead[i].group;
#pragma unroll
          for (int r = 0; r < S::row_tiles; ++r) enter_group<T, bits>(a, block0 + r, group, less[r], step[r]);
        }
        float dot[S::token_tiles][S::row_tiles][4] = {};
#pragma unroll
        for (int s = 0; s < steps; ++s) {
          uint32_t weights[S::row_tiles][4];
          weights_of_step<T, bits>(weights, ahead[i].codes, less, s);
#pragma unroll
          for (int c = 0; c < S::token_tiles; ++c) multiply_step<T>(dot[c], weights, Factors<T>(ahead[i].x[c][s]));
        }
        each_sum<S>([&](int c, int r, int j) { y[c][r][j] = __fmaf_rn(dot[c][r][j], step[r][j / 2], y[c][r][j]); });
        if (reader.tiles > 0) reader.read(ahead[i]);
      }
    }
    for (int warp = 0; warp < warps; ++warp) {  // always in the same order
      if (static_cast<int>(threadIdx.x) / 32 == warp)
        each_sum<S>([&](int c, int r, int j) {
          float& sum = sums[8 * c + 2 * (lane % 4) + j % 2][16 * r + lane / 4 + 8 * (j / 2)];
          sum = warp ? __fadd_rn(sum, y[c][r][j]) : y[c][r][j];
        });
      __syncthreads();
    }
    for (int i = threadIdx.x; i < count * S::channels; i += block_threads) {
      const int token = i / S::channels, at = i % S::channels;
      const int64_t n = block0 * rows + at;
      if (n >= a.shape.n) continue;
      float sum = sums[token][at];
      if (a.bias) sum = __fadd_rn(sum, a.bias[n]);
      narrow(sum, static_cast<typename T::Memory*>(a.out) + (token0 + token) * a.shape.n + n);
    }
    __syncthreads();  // the sums have been read
  });
}

// --- many tokens: a block keeps stages of x in shared memory, 64 values of K each. ---

template <class T, int row_warps_, int row_tiles_, int token_tiles_>
struct Tile {
  using Type = T;
  static constexpr int row_warps = row_warps_, row_tiles = row_tiles_, token_tiles = token_tiles_;
  static constexpr int token_warps = warps / row_warps, blocks = row_warps * row_tiles, channels = blocks * rows;
  static constexpr int tokens = token_warps * token_tiles * 8;
  static constexpr int values = 16 / sizeof(typename T::Memory);  // of a chunk of 16 bytes
  static constexpr int row_bytes = tile_k * sizeof(typename T::Memory), chunks = row_bytes / 16;
  static constexpr int stages = 3, stage_bytes = tokens * row_bytes;
  static constexpr int pitch = channels + values;  // of a token's results, gathered in shared memory
  static constexpr int out_bytes = tokens * pitch * static_cast<int>(sizeof(typename T::Memory));
  static constexpr int shared = stages * stage_bytes > out_bytes ? stages * stage_bytes : out_bytes;
  static_assert(shared <= 48 * 1024, "static shared memory");

  // Byte of a chunk of a token in a stage. What lanes read at once, four neighbours along K of each of four tokens (of
  // two, of float32), lies in all banks.
  static QK_HD constexpr int place(int token, int at) {
    const int swizzle = sizeof(typename T::Memory) == 2 ? 2 * (token % 4) : 4 * (token % 2);
    return token * row_bytes + (at ^ swizzle) * 16;
  }
};

// Copies of x: each thread has one chunk of every so many tokens. Groups consist of whole chunks.
template <class S>
struct Stager {
  using T = typename S::Type;
  using Memory = typename T::Memory;
  static constexpr int apart = block_threads / S::chunks, each = S::tokens / apart;
  static_assert(S::tokens % apart == 0, "every thread has as many");
  const GemmWeightOnlyArgs& a;
  const Memory* x;  // this thread's first token, at the next stage's values of K
  int count;        // tokens that there are
  int64_t left;     // values of the group in the next stage and after

  __device__ Stager(const GemmWeightOnlyArgs& args, int64_t token0, int all) : a(args), count(all) {
    const int64_t token = least(threadIdx.x / S::chunks, all - 1);
    x = static_cast<const Memory*>(a.x) + (token0 + token) * a.layout.k + threadIdx.x % S::chunks * S::values;
    left = a.layout.segment_k;
  }

  // The next stage. What lies past the group's end, or is no token, is 0.
  __device__ void next(uint8_t* stage) {
    const int64_t mine = left - threadIdx.x % S::chunks * S::values;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int token = threadIdx.x / S::chunks + i * apart;
      uint8_t* to = stage + S::place(token, threadIdx.x % S::chunks);
      const Memory* from = x + i * apart * a.layout.k;
      const bool there = token < count;
      if (there && mine > 0)
        copy_async<16>(to, reinterpret_cast<const uint8_t*>(from));
      else
        store(reinterpret_cast<Memory*>(to), Values<Memory, S::values>{});
    }
    const int64_t by = least(tile_k, left);
    x += by;  // groups follow each other without gaps
    left -= by;
    if (!left) left = a.layout.segment_k;
  }
};

template <class S, int bits, bool grouped>
__global__ void __launch_bounds__(block_threads, 1) many_rows_kernel(GemmWeightOnlyArgs a) {
  using T = typename S::Type;
  using Memory = typename T::Memory;
  __shared__ __align__(16) uint8_t x[S::shared];
  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % S::row_warps;
  const int first_token = threadIdx.x / 32 / S::row_warps * (8 * S::token_tiles);  // of the warp
  const int64_t parts = ceil_div(a.layout.blocks_per_outer, S::blocks);
  const int group_tiles = static_cast<int>(a.layout.segment_padded / tile_k);
  const int all_tiles = group_tiles * static_cast<int>(a.layout.k_groups);

  each_job<block_threads>(ceil_div(a.m, S::tokens) * parts, [&](int64_t job) {
    const int64_t part = job % parts, token0 = job / parts * S::tokens;
    const int count = static_cast<int>(least(S::tokens, a.m - token0));
    const int64_t block0 = part * S::blocks + row_warp * S::row_tiles;
    Stager<S> stager(a, token0, count);
    const uint8_t* weights[S::row_tiles];
    Codes<bits> now[S::row_tiles], next[S::row_tiles];
    uint32_t less[S::row_tiles][2];
    float step[S::row_tiles][2];
    const auto enter = [&](int64_t group) {
#pragma unroll
      for (int r = 0; r < S::row_tiles; ++r) enter_group<T, bits>(a, block0 + r, group, less[r], step[r]);
    };
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) now[r] = Codes<bits>::at(weights[r] = weights_of_block<bits>(a, block0 + r));
    enter(0);
    __syncthreads();  // the last job's results have left
#pragma unroll
    for (int i = 0; i < S::stages - 1; ++i) {
      if (i < all_tiles) stager.next(x + i * S::stage_bytes);
      end_batch();
    }
    float dot[S::token_tiles][S::row_tiles][4] = {};
    float y[grouped ? S::token_tiles : 1][S::row_tiles][4] = {};
    for (int tile = 0, group = 0, left = group_tiles; tile < all_tiles; ++tile) {
      wait_copies<S::stages - 2>();
      __syncthreads();  // the stage is there for all, and the one before it has been read by all
      if (tile + S::stages - 1 < all_tiles) stager.next(x + (tile + S::stages - 1) % S::stages * S::stage_bytes);
      end_batch();
#pragma unroll
      for (int r = 0; r < S::row_tiles; ++r)
        if (tile + 1 < all_tiles) next[r] = Codes<bits>::at(weights[r] += tile_bytes(bits));
      const uint8_t* stage = x + tile % S::stages * S::stage_bytes;
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        uint32_t first[S::row_tiles][4];
        weights_of_step<T, bits>(first, now, less, s);
        const int value = 16 * s + 4 * (lane % 4);
#pragma unroll
        for (int c = 0; c < S::token_tiles; ++c) {
          const uint8_t* chunk = stage + S::place(first_token + 8 * c + lane / 4, value / S::values);
          multiply_step<T>(dot[c], first,
                           Factors<T>(T::four(reinterpret_cast<const Memory*>(chunk) + value % S::values)));
        }
      }
#pragma unroll
      for (int r = 0; r < S::row_tiles; ++r) now[r] = next[r];
      if constexpr (grouped) {
        if (--left) continue;
        left = group_tiles;
        each_sum<S>([&](int c, int r, int j) {
          y[c][r][j] = __fmaf_rn(dot[c][r][j], step[r][j / 2], y[c][r][j]);
          dot[c][r][j] = 0;
        });
        if (tile + 1 < all_tiles) enter(++group);
      }
    }
    __syncthreads();  // x has been read: results are gathered there, to leave as whole rows
    each_sum<S>([&](int c, int r, int j) {
      const int channel = (row_warp * S::row_tiles + r) * rows + lane / 4 + 8 * (j / 2);
      const int64_t n = least(part * S::channels + channel, a.shape.n - 1);
      float value = grouped ? y[grouped ? c : 0][r][j] : __fmul_rn(dot[c][r][j], step[r][j / 2]);
      if (a.bias) value = __fadd_rn(value, a.bias[n]);
      const int token = first_token + 8 * c + 2 * (lane % 4) + j % 2;
      narrow(value, reinterpret_cast<Memory*>(x) + token * S::pitch + channel);
    });
    __syncthreads();
    const int length = static_cast<int>(least(S::channels, a.shape.n - part * S::channels));
    Memory* out = static_cast<Memory*>(a.out) + token0 * a.shape.n + part * S::channels;
    const auto leave = [&](auto together) {
      for (int i = threadIdx.x; i < count * (length / together); i += block_threads) {
        const int token = i / (length / together), at = i % (length / together) * together;
        store(out + token * a.shape.n + at, load<together>(reinterpret_cast<const Memory*>(x) + token * S::pitch + at));
      }
    };
    if (length % S::values == 0 && a.shape.n % S::values == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0)
      leave(std::integral_constant<int, S::values>{});
    else
      leave(std::integral_constant<int, 1>{});
  });
}

template <class T, int bits>
void run(const GemmWeightOnlyArgs& a) {
  constexpr const char* op = "gemm_weight_only";
  const int64_t blocks = a.layout.blocks_per_outer;
  const auto whole = [&](int values) {  // of x, wherever a group begins
    const int64_t bytes = values * static_cast<int64_t>(sizeof(typename T::Memory));
    return a.layout.segment_k % values == 0 && reinterpret_cast<uintptr_t>(a.x) % bytes == 0;
  };
  const auto few = [&](auto shape, auto word) {
    using S = decltype(shape);
    launch(op, few_rows_kernel<S, bits, word>, ceil_div(a.m, S::tokens) * ceil_div(blocks, S::row_tiles), a);
  };
  const auto many = [&](auto tile, auto grouped) {
    using S = decltype(tile);
    launch(op, many_rows_kernel<S, bits, grouped>, ceil_div(a.m, S::tokens) * ceil_div(blocks, S::blocks), a);
  };
  constexpr std::integral_constant<int, 4> four;
  using Middle = Tile<T, 4, 1, 4>;  // 64 channels x 64 tokens
  if (!whole(a.m > 16 ? Middle::values : 4)) return few(Shape<T, 1, 1, 4>{}, std::integral_constant<int, 1>{});
  if (a.m <= 8) return few(Shape<T, 1, 1, 4>{}, four);
  if (a.m <= 16) return few(Shape<T, 2, 2, 2>{}, four);
  // A large tile reads x and weights half as often, where there are enough for every processor.
  if constexpr (T::parts == 1) {
    using Large = Tile<T, 4, 2, 8>;  // 128 x 128
    const bool enough = ceil_div(a.m, Large::tokens) * ceil_div(blocks, Large::blocks) >= processors(op);
    if (a.layout.k_groups == 1 && enough) return many(Large{}, std::false_type{});
  }
  many(Middle{}, std::true_type{});
}

}  // namespace

void gemm_weight_only(const GemmWeightOnlyArgs& a) {
  if (a.m == 0) return;
  check_aligned("gemm_weight_only", "weight", a.weight, 16);
  with_bits(a.shape.bits, [&](auto bits) {
    switch (a.type) {
      case FloatType::float32: return run<Float32, bits>(a);
      case FloatType::float16: return run<Float16, bits>(a);
      case FloatType::bfloat16: return run<BFloat16, bits>(a);
    }
  });
}

}  // namespace qk::cuda
