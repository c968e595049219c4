#include "ops/dequantize.h"

#include "cpu/chunks.h"
#include "cpu/transpose.h"

namespace qk::cpu::QK_ISA {
namespace {

void to_floats(const uint8_t* __restrict codes, float* __restrict out, int64_t n, float step, float zero) {
  for (int64_t i = 0; i < n; ++i) out[i] = (static_cast<float>(codes[i]) - zero) * step;
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    to_floats(a.codes + at, a.out + at, n, a.step[row], static_cast<float>(a.zero[row]));
  });
}

// The way back of quantize_transposed.
void dequantize_transposed(const DequantizeTransposedArgs& a) {
  constexpr int64_t strip = 64;
  const float step = *a.step, zero = static_cast<float>(*a.zero);
  const int64_t strips = (a.pixels + strip - 1) / strip;
  const int64_t grain = most<int64_t>(1, grain_values / (strip * most<int64_t>(1, a.channels)));
  parallel_for(a.images * strips, grain, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t tile[16 * strip] = {};
    for (int64_t job = begin; job < end; ++job) {
      const int64_t image = job / strips, pixel = job % strips * strip;
      const int64_t n = least(strip, a.pixels - pixel);
      const uint8_t* codes = a.codes + (image * a.pixels + pixel) * a.channels;
      float* out = a.out + image * a.channels * a.pixels + pixel;
      for (int64_t channel = 0; channel < a.channels; channel += 16) {
        const int64_t group = least<int64_t>(16, a.channels - channel);
        for (int64_t p = 0; p < n; p += 16) {
          if (group == 16 && p + 16 <= n)
            transpose_16(codes + p * a.channels + channel, a.channels, tile + p, strip, 16);
          else
            for (int64_t c = 0; c < group; ++c)
              for (int64_t i = p; i < least(n, p + 16); ++i) tile[c * strip + i] = codes[i * a.channels + channel + c];
        }
        for (int64_t c = 0; c < group; ++c) to_floats(tile + c * strip, out + (channel + c) * a.pixels, n, step, zero);
      }
    }
  });
}

}  // namespace qk::cpu::QK_ISA
