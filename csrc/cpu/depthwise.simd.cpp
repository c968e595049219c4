// One output channel of each input channel: sums of kh * kw products, vectorized over channels.
#include "core/scratch.h"
#include "cpu/dot.h"
#include "cpu/finish.h"
#include "ops/conv2d.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t products_per_thread = 256 * 1024;  // below this a second thread costs more than it saves
constexpr int64_t part_bytes = strip * 4 / strip_parts;
constexpr int blocks_of_strip = strip / block;

// What a worker needs, in its own memory, channels filled up to whole strips.
struct Plan {
  int64_t channels, strips, tap_groups;
  int64_t weights_at, steps_at, bias_at, sums_at, zeros_at, taps_at, bytes;

  explicit Plan(const Conv2dArgs& a)
      : channels(a.shape.n), strips(ceil_div(channels, strip)), tap_groups(ceil_div(a.shape.taps(), 4)) {
    const int64_t all = strips * strip;
    weights_at = 0;  // [strips][tap_groups][parts][part_bytes]
    steps_at = weights_at + all * tap_groups * 4;
    bias_at = steps_at + all * 4;
    sums_at = bias_at + all * 4;
    zeros_at = sums_at + all * 4;  // a pixel of code x_zero
    taps_at = zeros_at + all;      // [tap_groups * 4] pointers
    bytes = taps_at + tap_groups * 4 * static_cast<int64_t>(sizeof(uint8_t*));
  }
};

void prepare(const Conv2dArgs& a, const Plan& p, uint8_t* memory) {
  const PackedLayout& l = a.layout;
  const uint8_t* codes = a.weight + l.codes_at;
  const uint32_t zero = static_cast<uint32_t>(*a.epilogue.x_zero);
  for (int64_t s = 0; s < p.strips; ++s)
    for (int64_t t = 0; t < p.tap_groups; ++t)
      for (int64_t j = 0; j < strip_parts; ++j)
        for (int64_t lane = 0; lane < blocks_of_strip; ++lane) {
          constexpr int64_t piece = part_bytes / blocks_of_strip;
          uint8_t* to = memory + p.weights_at + ((s * p.tap_groups + t) * strip_parts + j) * part_bytes + lane * piece;
          const int64_t at = s * blocks_of_strip + lane;
          if (at < l.blocks())
            std::memcpy(to, codes + at * l.block_bytes + t * PackedLayout::vector + j * piece, piece);
          else
            std::memset(to, 0, piece);
        }
  float* steps = reinterpret_cast<float*>(memory + p.steps_at);
  float* bias = reinterpret_cast<float*>(memory + p.bias_at);
  uint32_t* sums = reinterpret_cast<uint32_t*>(memory + p.sums_at);
  for (int64_t i = 0; i < p.strips * strip; ++i) {
    const bool there = i < p.channels;
    steps[i] = there ? *a.epilogue.x_step * a.epilogue.weight_step[i] : 0.0f;
    bias[i] = there && a.epilogue.bias ? a.epilogue.bias[i] : -0.0f;  // -0 leaves every sum alone
    sums[i] = there ? load4(a.weight + l.sums_at + i * 4) * zero : 0;
  }
  std::memset(memory + p.zeros_at, static_cast<int>(zero), static_cast<size_t>(p.strips * strip));
}

template <bool small, class Finish>
void pixels(const Conv2dArgs& a, const Plan& p, const Finish& finish, uint8_t* memory, int64_t begin, int64_t end) {
  const uint8_t** taps = reinterpret_cast<const uint8_t**>(memory + p.taps_at);
  const float* steps = reinterpret_cast<const float*>(memory + p.steps_at);
  const float* bias = reinterpret_cast<const float*>(memory + p.bias_at);
  const uint32_t* sums = reinterpret_cast<const uint32_t*>(memory + p.sums_at);
  for (int64_t i = 0; i < p.tap_groups * 4; ++i) taps[i] = memory + p.zeros_at;
  int64_t ox = begin % a.ow, oy = begin / a.ow % a.oh, b = begin / a.ow / a.oh;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    int64_t tap = 0;
    for (int64_t ky = 0; ky < a.shape.kh; ++ky) {
      const int64_t y = oy * a.stride_h - a.pad_h + ky * a.dilation_h;
      const uint8_t* line = a.x + (b * a.h + y) * a.w * p.channels;
      for (int64_t kx = 0; kx < a.shape.kw; ++kx, ++tap) {
        const int64_t x = ox * a.stride_w - a.pad_w + kx * a.dilation_w;
        const bool inside = y >= 0 && y < a.h && x >= 0 && x < a.w;
        taps[tap] = inside ? line + x * p.channels : memory + p.zeros_at;
      }
    }
    const uint8_t* w = memory + p.weights_at;
    for (int64_t s = 0; s < p.strips; ++s) {
      const int64_t at = s * strip, valid = p.channels - at;
      Part acc[strip_parts];
#pragma GCC unroll 4
      for (int j = 0; j < strip_parts; ++j) acc[j] = no_part();
      for (int64_t t = 0; t < p.tap_groups; ++t, w += strip_parts * part_bytes) {
        Part x[strip_parts];
        interleave4(taps + 4 * t, at, valid, x);
#pragma GCC unroll 4
        for (int j = 0; j < strip_parts; ++j) acc[j] = dot_part<small>(acc[j], x[j], load_part(w + j * part_bytes));
      }
      alignas(64) int32_t total[strip];
      store_strip(total, acc);
      for (int64_t i = 0; i < strip && i < valid; i += block) {
        const Floats y = scaled(load<Words>(total + i), load<Words>(sums + at + i), load<Floats>(steps + at + i));
        finish.write(y + load<Floats>(bias + at + i), a.out, pixel * p.channels + at + i, valid - i);
      }
    }
    if (++ox == a.ow) {
      ox = 0;
      if (++oy == a.oh) oy = 0, ++b;
    }
  }
}

}  // namespace

void depthwise(const Conv2dArgs& a) {
  const Plan p(a);
  const int64_t grain = most<int64_t>(1, products_per_thread / (p.channels * a.shape.taps()));
  parallel_for(a.batch * a.oh * a.ow, grain, [&](int64_t begin, int64_t end) {
    uint8_t* memory = static_cast<uint8_t*>(thread_scratch(p.bytes));
    prepare(a, p, memory);
    with_finish(a.epilogue, [&](const auto& finish) {
      if (a.shape.bits < 8)
        pixels<true>(a, p, finish, memory, begin, end);
      else
        pixels<false>(a, p, finish, memory, begin, end);
    });
  });
}

}  // namespace qk::cpu::QK_ISA
