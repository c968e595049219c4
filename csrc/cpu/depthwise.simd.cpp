#include "ops/conv2d.h"

#include "core/scratch.h"
#include "cpu/dot.h"
#include "cpu/finish.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t pixel_work = 64 * 1024;  // products a thread should get at least

}  // namespace

// One output channel of each input channel: sums of kh * kw products, vectorized over channels.
void depthwise(const Conv2dArgs& a) {
  const PackedLayout& l = a.layout;
  const int64_t channels = a.shape.n, taps = a.shape.taps(), pixels = a.batch * a.oh * a.ow;
  const int32_t zero = *a.epilogue.x_zero;
  const int32_t* sums = reinterpret_cast<const int32_t*>(a.weight + l.sums_at);
  const Finish finish(a.epilogue);
  const float x_step = *a.epilogue.x_step;
  const int64_t grain = most<int64_t>(1, pixel_work / (channels * taps));
  parallel_for(pixels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = 0; at < l.blocks(); ++at) {
      const int64_t c0 = at * block, valid = least<int64_t>(block, channels - c0);
      float steps[block] = {}, bias[block] = {};
      for (int64_t i = 0; i < valid; ++i) {
        steps[i] = a.epilogue.weight_step[c0 + i];
        bias[i] = a.epilogue.bias ? a.epilogue.bias[c0 + i] : 0.0f;
      }
      const int8_t* weight = reinterpret_cast<const int8_t*>(a.weight + l.codes_at + at * l.block_bytes);
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const int64_t x0 = pixel % a.ow * a.stride_w - a.pad_w, b = pixel / a.ow / a.oh;
        const int64_t y0 = pixel / a.ow % a.oh * a.stride_h - a.pad_h;
        int32_t acc[block] = {};
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t y = y0 + tap / a.shape.kw * a.dilation_h, x = x0 + tap % a.shape.kw * a.dilation_w;
          const int8_t* w = weight + tap / 4 * 64 + tap % 4;
          if (y < 0 || y >= a.h || x < 0 || x >= a.w) {
            for (int i = 0; i < block; ++i) acc[i] += zero * w[4 * i];
          } else {
            const uint8_t* codes = a.x + ((b * a.h + y) * a.w + x) * channels + c0;
            for (int64_t i = 0; i < valid; ++i) acc[i] += codes[i] * w[4 * i];
          }
        }
        float y[block];
        scale<true>(acc, sums + at * block, zero, x_step, steps, y);
        finish.write(y, bias, a.out, pixel * channels + c0, valid);
      }
    }
  });
}

}  // namespace qk::cpu::QK_ISA
