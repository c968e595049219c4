#include "ops/quantize.h"

#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/transpose.h"

namespace qk::cpu::QK_ISA {

void quantize(const QuantizeArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    to_codes(a.x + at, a.codes + at, n, Row(a.step[row], a.zero[row], a.bits));
  });
}

// 16 channels of a strip of pixels become codes in a tile of the L1 cache, which is then written transposed: x is read
// once, and the four groups of channels of a cache line of codes are written while that line is near.
void quantize_transposed(const QuantizeTransposedArgs& a) {
  constexpr int64_t strip = 64;
  const Row r(*a.step, *a.zero, a.bits);
  const float* end_of_x = a.x + a.images * a.channels * a.pixels;
  const int64_t strips = (a.pixels + strip - 1) / strip;
  const int64_t grain = most<int64_t>(1, grain_values / (strip * most<int64_t>(1, a.channels)));
  parallel_for(a.images * strips, grain, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t tile[16 * strip] = {};
    for (int64_t job = begin; job < end; ++job) {
      const int64_t image = job / strips, pixel = job % strips * strip;
      const int64_t n = least(strip, a.pixels - pixel);
      const float* x = a.x + image * a.channels * a.pixels + pixel;
      uint8_t* out = a.codes + (image * a.pixels + pixel) * a.channels;
      for (int64_t channel = 0; channel < a.channels; channel += 16) {
        const int64_t group = least<int64_t>(16, a.channels - channel);
        for (int64_t c = 0; c < group; ++c) {
          // Whole vectors where x goes on behind the strip: the codes too many stay in the tile.
          const float* from = x + (channel + c) * a.pixels;
          to_codes(from, tile + c * strip, end_of_x - from >= strip ? strip : n, r);
        }
        if (group == 16)
          for (int64_t p = 0; p < n; p += 16)
            transpose_16(tile + p, strip, out + p * a.channels + channel, a.channels, least<int64_t>(16, n - p));
        else {
          int64_t done = 0;
          if (a.channels == 3)
            for (; done + 16 <= n; done += 16) interleave_3(tile + done, strip, out + 3 * done);
          for (int64_t c = 0; c < group; ++c)
            for (int64_t p = done; p < n; ++p) out[p * a.channels + channel + c] = tile[c * strip + p];
        }
      }
    }
  });
}

}  // namespace qk::cpu::QK_ISA
