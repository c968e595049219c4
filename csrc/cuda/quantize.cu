#include "ops/quantize.h"

#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

template <int team>
__global__ void quantize_kernel(QuantizeArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const Row r = row_of(a.step[row], a.zero[row], a.bits);
    const float* x = a.x + at;
    uint8_t* codes = a.codes + at;
    each_value<team, 4>(count, values_before<4>(x, codes), [&](int64_t i, auto width) {
      const auto xs = load<width>(x + i);
      Values<uint8_t, width> out;
      for (int j = 0; j < width; ++j) out.v[j] = code_of(xs.v[j], r);
      store(codes + i, out);
    });
  });
}

// A block turns tiles of 64 channels x 64 pixels, read along pixels and written along channels.
constexpr int tile = 64;

__global__ void quantize_transposed_kernel(QuantizeTransposedArgs a, int64_t channel_tiles, int64_t pixel_tiles) {
  // A pitch of 17 words: the 32 pixels that a warp stores at once fall in different banks.
  __shared__ __align__(4) uint8_t turned[tile][tile + 4];
  const Row r = row_of(*a.step, *a.zero, a.bits);
  each_job<block_threads>(a.images * channel_tiles * pixel_tiles, [&](int64_t job) {
    const int64_t image = job / (channel_tiles * pixel_tiles), pixel0 = job / channel_tiles % pixel_tiles * tile;
    const int64_t channel0 = job % channel_tiles * tile;
    const int channels = least(tile, a.channels - channel0), pixels = least(tile, a.pixels - pixel0);
    const float* x = a.x + (image * a.channels + channel0) * a.pixels + pixel0;
    uint8_t* codes = a.codes + (image * a.pixels + pixel0) * a.channels + channel0;
    __syncthreads();  // the last tile has been written
    for (int i = threadIdx.x; i < tile * channels; i += block_threads) {
      const int channel = i / tile, pixel = i % tile;
      if (pixel < pixels) turned[pixel][channel] = code_of(x[channel * a.pixels + pixel], r);
    }
    __syncthreads();
    if (a.channels % 4 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 4 == 0) {
      for (int i = threadIdx.x; i < tile / 4 * pixels; i += block_threads) {
        const int pixel = i / (tile / 4), channel = i % (tile / 4) * 4;
        if (channel < channels) store(codes + pixel * a.channels + channel, load<4>(&turned[pixel][channel]));
      }
    } else {
      for (int i = threadIdx.x; i < tile * pixels; i += block_threads) {
        const int pixel = i / tile, channel = i % tile;
        if (channel < channels) codes[pixel * a.channels + channel] = turned[pixel][channel];
      }
    }
  });
}

}  // namespace

void quantize(const QuantizeArgs& a) {
  with_chunks(a.rows, a.cols, [&](int64_t blocks, auto team) { launch("quantize", quantize_kernel<team>, blocks, a); });
}

void quantize_transposed(const QuantizeTransposedArgs& a) {
  const int64_t channel_tiles = ceil_div(a.channels, tile), pixel_tiles = ceil_div(a.pixels, tile);
  launch("quantize", quantize_transposed_kernel, a.images * channel_tiles * pixel_tiles, a, channel_tiles, pixel_tiles);
}

}  // namespace qk::cuda
