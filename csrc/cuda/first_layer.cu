// Convolutions of images with up to four channels, as first layers are: in shared memory each pixel is a word, so that
// eight neighbours of a row are a step of the matrix instruction, wherever the window starts.
#include "cuda/product.cuh"

namespace qk::cuda {
namespace {

constexpr int tile_h = warps, tile_w = 16;  // output pixels of a block; a warp has a row of them
constexpr int row_tiles = 4, token_tiles = tile_w / 8;
constexpr int channels = row_tiles * rows;
constexpr int step_pixels = step_k / 4;
constexpr int most_words = 4096, most_steps = 8;  // of an image's part; of a window
constexpr int pitch = channels + 16;              // of a pixel's codes, gathered where the image was
static_assert(tile_h * tile_w * pitch <= 4 * most_words);

// How a window is taken apart, and what of an image a block reads for it.
struct Steps {
  int across, all, height, width;

  QK_HD explicit Steps(const Conv2dArgs& a)
      : across(static_cast<int>(ceil_div(a.shape.kw, step_pixels))),
        all(static_cast<int>(a.shape.kh) * across),
        height(static_cast<int>((tile_h - 1) * a.stride_h + (a.shape.kh - 1) * a.dilation_h + 1)),
        width(static_cast<int>((tile_w - 1) * a.stride_w) + across * step_pixels) {}
};

// The codes of a channel at four places of K, those of one tap; 0 beyond its channels.
template <int bits>
__device__ uint32_t codes_of_tap(const Conv2dArgs& a, int64_t n, int row, int col) {
  uint32_t word = 0;
  if (n >= a.shape.n || col >= a.shape.kw) return word;
  const uint8_t* block = a.weight + a.layout.codes_at + n / rows * a.layout.block_bytes;
  const auto first = static_cast<int>((row * a.shape.kw + col) * a.shape.c);
  for (int c = 0; c < a.shape.c; ++c) {
    const int k = first + c;
    const TileBits at = bits_of_tile(bits, static_cast<int>(n % rows), k % tile_k);
    word |= (block[k / tile_k * tile_bytes(bits) + at.byte] >> at.shift & top_code(bits)) << 8 * c;
  }
  return word;
}

template <int bits>
__global__ void __launch_bounds__(block_threads, 2)
    first_layer_kernel(Conv2dArgs a, int64_t down, int64_t across, int64_t tiles) {
  __shared__ __align__(16) uint32_t image[most_words];
  __shared__ __align__(16) uint32_t factors[most_steps * row_tiles * 32 * 4];
  const Steps steps(a);
  const Epilogue& e = a.epilogue;
  const Ending ending(e);
  const int32_t x_zero = *e.x_zero;
  const float x_step = *e.x_step;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const uint32_t padding = padding_of(a) >> 8 * (4 - a.shape.c);
  int64_t loaded = -1;  // part of the channels

  each_job<block_threads>(tiles * ceil_div(a.shape.n, channels), [&](int64_t job) {
    const int64_t part = job / tiles, tile = job % tiles, batch = tile / (down * across);
    const int64_t oy0 = tile / across % down * tile_h, ox0 = tile % across * tile_w;
    __syncthreads();  // the last job's image and factors have been read
    if (part != loaded)
      for (int i = threadIdx.x; i < steps.all * row_tiles * 32 * 4; i += block_threads) {
        const int of = i / 4 % 32, r = i / 128 % row_tiles, step = i / (128 * row_tiles);
        const int64_t n = part * channels + r * rows + of / 4 + 8 * (i % 2);
        factors[i] =
            codes_of_tap<bits>(a, n, step / steps.across, step % steps.across * step_pixels + 4 * (i % 4 / 2) + of % 4);
      }
    loaded = part;
    for (int i = threadIdx.x; i < steps.height * steps.width; i += block_threads) {
      const int64_t y = oy0 * a.stride_h - a.pad_h + i / steps.width, x = ox0 * a.stride_w - a.pad_w + i % steps.width;
      uint32_t pixel = padding;
      if (y >= 0 && y < a.h && x >= 0 && x < a.w) {
        const uint8_t* from = a.x + ((batch * a.h + y) * a.w + x) * a.shape.c;
        pixel = 0;
        for (int c = 0; c < a.shape.c; ++c) pixel |= static_cast<uint32_t>(from[c]) << 8 * c;
      }
      image[i] = pixel;
    }
    __syncthreads();

    int32_t dot[row_tiles][token_tiles][4] = {};
    int32_t x_sum[token_tiles] = {};
    for (int step = 0; step < steps.all; ++step) {
      const int row = step / steps.across, col = step % steps.across * step_pixels + t;
      const uint32_t* from = image + (warp * a.stride_h + row * a.dilation_h) * steps.width + col;
      uint32_t x[token_tiles][2];
#pragma unroll
      for (int c = 0; c < token_tiles; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[c][half] = from[(8 * c + g) * a.stride_w + 4 * half];
          // Pixels beyond the window have factors of 0.
          if constexpr (bits < 8) x_sum[c] = dot4(x[c][half], col + 4 * half < a.shape.kw ? 0x01010101u : 0, x_sum[c]);
        }
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) {
        const auto found = load<4>(factors + ((step * row_tiles + r) * 32 + lane) * 4);
#pragma unroll
        for (int c = 0; c < token_tiles; ++c) multiply<bits == 8>(dot[r][c], found.v, x[c][0], x[c][1]);
      }
    }
    for (int32_t& sum : x_sum)
      for (int apart = 1; apart < 4; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);

    const bool to_codes = e.out_step != nullptr;
    if (to_codes) __syncthreads();  // the image has been read
    auto* gathered = reinterpret_cast<uint8_t*>(image);
    const int64_t oy = oy0 + warp, row = (batch * a.oh + oy) * a.ow;
#pragma unroll
    for (int r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_part = r * rows + g + 8 * half;
        const int64_t n = part * channels + in_part;
        const Channel channel = channel_at<bits>(a, ending, n / rows, n, 0, 0);
#pragma unroll
        for (int c = 0; c < token_tiles; ++c)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int32_t codes = bits < 8 ? __shfl_sync(0xffffffffu, x_sum[c], 4 * (2 * t + j)) : 0;
            const int col = 8 * c + 2 * t + j;
            if (channel.n < 0 || oy >= a.oh || ox0 + col >= a.ow) continue;
            const int64_t at = (row + ox0 + col) * a.shape.n + n;
            const int32_t sum = exact_sum(dot[r][c][2 * half + j], channel, x_zero, codes);
            const float y = ending.completed(add_group(-0.0f, sum, x_step, channel.weight_step), channel.bias, at);
            if (to_codes)
              gathered[(warp * tile_w + col) * pitch + in_part] = code_of(y, ending.out);
            else
              static_cast<float*>(a.out)[at] = y;
          }
      }
    if (!to_codes) return;
    __syncthreads();
    const int length = least(channels, a.shape.n - part * channels), wide = least(tile_w, a.ow - ox0);
    const auto leave = [&](auto bytes) {
      const int in_pixel = length / bytes, high = least(tile_h, a.oh - oy0);
      for (int i = threadIdx.x; i < high * wide * in_pixel; i += block_threads) {
        const int y = i / (wide * in_pixel), x = i / in_pixel % wide, at = i % in_pixel * bytes;
        store(static_cast<uint8_t*>(a.out) + (((batch * a.oh + oy0 + y) * a.ow) + ox0 + x) * a.shape.n +
                  part * channels + at,
              load<bytes>(gathered + (y * tile_w + x) * pitch + at));
      }
    };
    if (length % 16 == 0 && a.shape.n % 16 == 0 && reinterpret_cast<uintptr_t>(a.out) % 16 == 0)
      leave(std::integral_constant<int, 16>{});
    else
      leave(std::integral_constant<int, 1>{});
  });
}

}  // namespace

bool convolve_first(const char* op, const Conv2dArgs& a) {
  if (a.shape.c > 4 || a.shape.taps() == 1 || a.shape.groups > 1 || a.shape.k_groups > 1 || a.dilation_w > 1)
    return false;
  const int64_t reach = (tile_h - 1) * a.stride_h + (a.shape.kh - 1) * a.dilation_h + 1;  // before it is cut to an int
  if (a.shape.kh > most_steps || a.shape.kw > step_pixels * most_steps || a.stride_w > most_words || reach > most_words)
    return false;
  const Steps steps(a);
  if (steps.all > most_steps || steps.height * steps.width > most_words) return false;
  const int64_t down = ceil_div(a.oh, tile_h), across = ceil_div(a.ow, tile_w), tiles = a.batch * down * across;
  // Blocks that keep their weights for many tiles.
  const int64_t blocks = least(tiles * ceil_div(a.shape.n, channels), 2 * processors(op));
  with_bits(a.shape.bits, [&](auto bits) { launch(op, first_layer_kernel<bits>, blocks, a, down, across, tiles); });
  return true;
}

}  // namespace qk::cuda
