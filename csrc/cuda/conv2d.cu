#include "cuda/conv2d.cuh"

#include "cuda/dot.cuh"
#include "cuda/epilogue.cuh"

namespace qk::cuda {
namespace {

// A block makes 16 channels of `tokens` output pixels: thread = channel + 16 * token, `per_thread` tokens 16 apart.
constexpr int channels = PackedLayout::block, token_lanes = block_threads / channels;
constexpr int piece = 16;    // values of K between two loads of x from shared memory
constexpr int staged = 128;  // values of K in shared memory at a time

// An output pixel, and where its window starts: x[first + (row * w + col) * pixel_bytes] is its tap (row, col).
struct Token {
  int64_t first;
  int64_t row, col;  // of the image; negative in the padding
  float x_step;
  int32_t x_zero;
};

__device__ Token token_at(const Conv2dArgs& a, int64_t token, int64_t channel) {
  const int64_t image = token / (a.ow * a.oh), of_image = a.epilogue.per_row ? image : 0;
  return {image * a.h * a.w * (a.shape.c * a.shape.groups) + channel, token / a.ow % a.oh * a.stride_h - a.pad_h,
          token % a.ow * a.stride_w - a.pad_w, a.epilogue.x_step[of_image], a.epilogue.x_zero[of_image]};
}

// `word` values of K from k on for one token: they share a tap, since word divides c. Padding has the code zero.
template <int word>
__device__ Values<uint8_t, word> gather(const Conv2dArgs& a, const Token& token, uint32_t k) {
  const uint32_t c_count = a.shape.c, kw = a.shape.kw;  // K is below 2^31; 64-bit divisions are calls
  const uint32_t tap = k / c_count, c = k - tap * c_count, tap_row = tap / kw;
  const int64_t row = token.row + tap_row * a.dilation_h, col = token.col + (tap - tap_row * kw) * a.dilation_w;
  if (row >= 0 && row < a.h && col >= 0 && col < a.w)
    return load<word>(a.x + token.first + (row * a.w + col) * (a.shape.c * a.shape.groups) + c);
  Values<uint8_t, word> padding;
  for (uint8_t& value : padding.v) value = token.x_zero;
  return padding;
}

template <int bits, int word, int per_thread>
__global__ void __launch_bounds__(block_threads, 2) convolve_kernel(Conv2dArgs a, int64_t all_tokens, int64_t tiles) {
  constexpr int tokens = token_lanes * per_thread, per_vector = PackedLayout::step * Bits<bits>::per_byte;
  constexpr int vectors = piece / per_vector, words = staged / 4;
  __shared__ __align__(16) uint8_t x[tokens][staged + piece];  // a pitch that spreads tokens over the banks
  __shared__ Token token[tokens];
  const PackedLayout& layout = a.layout;
  const int channel = threadIdx.x % channels, lane = threadIdx.x / channels;
  const int64_t segment_vectors = layout.segment_padded / per_vector;

  each_job<block_threads>(tiles * layout.blocks(), [&](int64_t job) {
    const int64_t block = job % layout.blocks(), token0 = job / layout.blocks() * tokens;
    const int64_t outer = block / layout.blocks_per_outer;
    const int64_t in_outer = block % layout.blocks_per_outer * channels + channel;
    const int64_t n = outer * layout.n_per_outer + in_outer;  // output channel, if in_outer is one
    const int count = least(tokens, all_tokens - token0);
    __syncthreads();  // the last job's tokens have been used
    if (static_cast<int>(threadIdx.x) < count)
      token[threadIdx.x] = token_at(a, token0 + threadIdx.x, outer * a.shape.c);

    float y[per_thread];
#pragma unroll
    for (float& value : y) value = -0.0f;  // leaves the first group's sum alone
    for (int64_t group = 0; group < layout.k_groups; ++group) {
      const int64_t first = group * layout.group_segments();
      int32_t dot[per_thread] = {}, x_sum[per_thread] = {};
      // Every segment of the group, `staged` values of K at a time.
      for (int64_t segment = first, k0 = 0; segment < first + layout.group_segments();) {
        const uint8_t* codes = a.weight + layout.codes_at + block * layout.block_bytes +
                               segment * segment_vectors * PackedLayout::vector + channel * PackedLayout::step;
        const int length = least(staged, layout.segment_k - k0);
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * (staged / word); i += block_threads) {
          const int t = i / (staged / word), k = i % (staged / word) * word;
          Values<uint8_t, word> values{};  // 0 past the group's end
          if (t < count && k < length) values = gather<word>(a, token[t], segment * layout.segment_k + k0 + k);
          store(&x[t][k], values);
        }
        __syncthreads();
        for (int k = 0; k < length; k += piece) {
          uint32_t weights[vectors];
#pragma unroll
          for (int v = 0; v < vectors; ++v) {
            const int64_t vector = (k0 + k) / per_vector + v;
            weights[v] = vector < segment_vectors
                             ? *reinterpret_cast<const uint32_t*>(codes + vector * PackedLayout::vector)
                             : 0;
          }
#pragma unroll
          for (int t = 0; t < per_thread; ++t) {
            const auto xs = load<4>(reinterpret_cast<const uint32_t*>(&x[lane + t * token_lanes][k]));
#pragma unroll
            for (int step = 0; step < piece / 4; ++step) {
              uint32_t w = weights[step / Bits<bits>::per_byte] >> (step % Bits<bits>::per_byte * bits);
              if (bits < 8) w &= Bits<bits>::mask * 0x01010101u;  // never negative, so int8 holds it too
              dot[t] = dot4(xs.v[step], w, dot[t]);
            }
          }
        }
        if (bits < 8) {  // the 16 threads of a token share the sum of its codes
#pragma unroll
          for (int t = 0; t < per_thread; ++t)
            for (int i = channel; i < words; i += channels)
              x_sum[t] = dot4(reinterpret_cast<const uint32_t*>(x[lane + t * token_lanes])[i], 0x01010101u, x_sum[t]);
        }
        k0 += staged;
        if (k0 >= layout.segment_k) k0 = 0, ++segment;
      }
      // sum (x - x_zero) (weight - zero) = dot - zero * sum x - x_zero * sum (weight - zero), modulo 2^32 on the way.
      const int64_t at = (block * layout.k_groups + group) * channels + channel;
      const uint32_t weight_sum = reinterpret_cast<const int32_t*>(a.weight + layout.sums_at)[at];
      const uint32_t zero = bits < 8 ? a.weight[layout.zeros_at + at] : 0;
      const float weight_step = in_outer < layout.n_per_outer ? a.epilogue.weight_step[n * layout.k_groups + group] : 0;
#pragma unroll
      for (int t = 0; t < per_thread; ++t) {
        if (bits < 8)
          for (int apart = channels / 2; apart; apart /= 2) x_sum[t] += __shfl_xor_sync(0xffffffffu, x_sum[t], apart);
        const Token& of = token[least(lane + t * token_lanes, count - 1)];
        const uint32_t sum = dot[t] - zero * x_sum[t] - weight_sum * static_cast<uint32_t>(of.x_zero);
        y[t] = add_group(y[t], static_cast<int32_t>(sum), of.x_step, weight_step);
      }
    }
#pragma unroll
    for (int t = 0; t < per_thread; ++t) {
      const int64_t at = token0 + lane + t * token_lanes;
      if (at < all_tokens && in_outer < layout.n_per_outer) finish(a.epilogue, y[t], n, a.out, at * a.shape.n + n);
    }
  });
}

// A thread makes one channel of one output pixel; neighbours in a warp read neighbouring channels.
__global__ void depthwise_kernel(Conv2dArgs a, int64_t all) {
  const int64_t step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < all; i += step) {
    const int64_t n = i % a.shape.n;
    const Token token = token_at(a, i / a.shape.n, n);
    uint32_t sum = 0;
    for (int64_t k = 0; k < a.shape.taps(); ++k) {
      const int64_t at = a.layout.code_at(n / channels, a.layout.tap_at(k), n % channels);
      const int32_t code = gather<1>(a, token, k).v[0];
      sum += static_cast<uint32_t>((code - token.x_zero) * static_cast<int8_t>(a.weight[at]));
    }
    finish(a.epilogue, add_group(-0.0f, static_cast<int32_t>(sum), token.x_step, a.epilogue.weight_step[n]), n, a.out,
           i);
  }
}

}  // namespace

void convolve(const char* op, const Conv2dArgs& a) {
  check_aligned(op, "weight", a.weight, 4);
  const int64_t tokens = a.batch * a.oh * a.ow;
  const bool whole_words =
      a.shape.c % 4 == 0 && a.layout.segment_k % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % 4 == 0;
  with_bits(a.shape.bits, [&](auto bits) {
    const auto run = [&](auto word, auto per_thread) {
      const int64_t tiles = ceil_div(tokens, token_lanes * per_thread);
      launch(op, convolve_kernel<bits, word, per_thread>, tiles * a.layout.blocks(), a, tokens, tiles);
    };
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 1> one;
    if (tokens > 2 * token_lanes)
      whole_words ? run(four, four) : run(one, four);
    else
      whole_words ? run(four, one) : run(one, one);
  });
}

void conv2d(const Conv2dArgs& a) {
  if (!a.shape.depthwise()) return convolve("conv2d", a);
  const int64_t all = a.batch * a.oh * a.ow * a.shape.n;
  launch("conv2d", depthwise_kernel, ceil_div(all, block_threads), a, all);
}

}  // namespace qk::cuda
