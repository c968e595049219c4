#include "ops/dequantize.h"

#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

template <int team>
__global__ void dequantize_kernel(DequantizeArgs a) {
  each_chunk<team>(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t count, int64_t) {
    const float step = a.step[row];
    const int32_t zero = a.zero[row];
    const uint8_t* codes = a.codes + at;
    float* out = a.out + at;
    each_value<team, 4>(count, values_before<4>(out, codes), [&](int64_t i, auto width) {
      const auto us = load<width>(codes + i);
      Values<float, width> values;
      for (int j = 0; j < width; ++j) values.v[j] = __fmul_rn(static_cast<float>(us.v[j] - zero), step);
      store(out + i, values);
    });
  });
}

// A block turns tiles of 64 pixels x 64 channels, read along channels and written along pixels.
constexpr int tile = 64;

__global__ void dequantize_transposed_kernel(DequantizeTransposedArgs a, int64_t channel_tiles, int64_t pixel_tiles) {
  // A pitch of 17 words: the 32 pixels that a warp reads at once fall in different banks.
  __shared__ uint8_t turned[tile][tile + 4];
  const float step = *a.step;
  const int32_t zero = *a.zero;
  each_job<block_threads>(a.images * channel_tiles * pixel_tiles, [&](int64_t job) {
    const int64_t image = job / (channel_tiles * pixel_tiles), pixel0 = job / channel_tiles % pixel_tiles * tile;
    const int64_t channel0 = job % channel_tiles * tile;
    const int channels = least(tile, a.channels - channel0), pixels = least(tile, a.pixels - pixel0);
    const uint8_t* codes = a.codes + (image * a.pixels + pixel0) * a.channels + channel0;
    float* out = a.out + (image * a.channels + channel0) * a.pixels + pixel0;
    __syncthreads();  // the last tile has been written
    for (int i = threadIdx.x; i < tile * pixels; i += block_threads) {
      const int pixel = i / tile, channel = i % tile;
      if (channel < channels) turned[pixel][channel] = codes[pixel * a.channels + channel];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile * channels; i += block_threads) {
      const int channel = i / tile, pixel = i % tile;
      if (pixel < pixels)
        out[channel * a.pixels + pixel] = __fmul_rn(static_cast<float>(turned[pixel][channel] - zero), step);
    }
  });
}

}  // namespace

void dequantize_transposed(const DequantizeTransposedArgs& a) {
  const int64_t channel_tiles = ceil_div(a.channels, tile), pixel_tiles = ceil_div(a.pixels, tile);
  launch("dequantize", dequantize_transposed_kernel, a.images * channel_tiles * pixel_tiles, a, channel_tiles,
         pixel_tiles);
}

void dequantize(const DequantizeArgs& a) {
  with_chunks(a.rows, a.cols,
              [&](int64_t blocks, auto team) { launch("dequantize", dequantize_kernel<team>, blocks, a); });
}

}  // namespace qk::cuda
