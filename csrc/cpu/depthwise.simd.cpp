// One output channel of each input channel. Four rows of the image are interleaved byte by byte, column by column, so
// that one dot product takes four taps of a column of the kernel; a column interleaved once serves every kernel column
// that meets it and, where the weights leave a row free, two rows of results. What remains is mostly the epilogue: 3 of
// the 11 vector operations for 16 results of a 3x3 kernel are products.
#include "core/scratch.h"
#include "cpu/strip.h"
#include "ops/conv2d.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t products_per_thread = 512 * 1024;  // below this a second thread costs more than it saves
constexpr int64_t segment = 28;                      // results of a row for which columns are interleaved at a time
constexpr int64_t column_budget = 512;               // columns x groups of four rows: 128 KiB
constexpr int64_t strip_budget = 256 * 1024;         // of prepared weights: they stay in L2
constexpr int part_bytes = part_lanes * 4;

struct Plan {
  int64_t groups;      // of four rows of the image, under one or two rows of results
  int64_t rows;        // of results at a time: 1 or 2
  int64_t steps;       // dot products for each lane and row of results
  bool dense;          // columns as in the image; else kw for each result
  int64_t width;       // results at a time
  int64_t pixel_step;  // columns from one result to the next
  int64_t columns;     // for `width` results
  // Units of work: a group of rows of results x a chunk of strips, chunk by chunk, so that each row of x is read once.
  int64_t row_groups, strips, chunk, chunks;
  int64_t scale_at, tame_at, strip_bytes;  // of a prepared strip
  int64_t columns_at, rows_at, steps_at, zeros_at, bytes;
};

int64_t strips_of(int64_t channels) {
  const int64_t rest = channels % Wide<true>::channels;
  const bool wide = rest > Wide<true>::channels - Narrow<true>::channels;
  return channels / Wide<true>::channels + (wide ? 1 : ceil_div(rest, int64_t{Narrow<true>::channels}));
}

Plan plan(const Conv2dArgs& a, int64_t threads) {
  Plan p{};
  const int64_t kh = a.shape.kh, kw = a.shape.kw, channels = a.shape.n;
  p.groups = ceil_div(kh, 4);
  p.rows = a.dilation_h == 1 && a.oh > 1 && kh + a.stride_h <= 4 * p.groups ? 2 : 1;
  p.steps = kw * p.groups;
  const int64_t reach = (kw - 1) * a.dilation_w + 1;
  p.dense = reach <= 128 && a.stride_w <= 8;
  p.pixel_step = p.dense ? a.stride_w : kw;
  const int64_t extra = p.dense ? most<int64_t>(0, reach - a.stride_w) : 0;
  p.width = (column_budget / p.groups - extra) / p.pixel_step;
  p.width = least(most<int64_t>(1, least(p.width, segment)), a.ow);
  p.columns = p.dense ? (p.width - 1) * a.stride_w + reach : p.width * kw;
  p.strips = strips_of(channels);
  p.row_groups = ceil_div(a.oh, p.rows);
  constexpr int64_t lanes = Wide<true>::channels;
  p.scale_at = p.steps * p.rows * lanes * 4;  // weights are [parts][steps][rows][part_bytes]
  p.tame_at = p.scale_at + 3 * lanes * 4;     // start of the sum, step, bias
  p.strip_bytes = p.tame_at + 64;
  const int64_t few_rows = ceil_div(4 * threads, most<int64_t>(1, a.batch * p.row_groups));
  p.chunks = most(ceil_div(p.strips * p.strip_bytes, strip_budget), threads > 1 ? few_rows : 1);
  p.chunks = least(p.chunks, p.strips);
  p.chunk = ceil_div(p.strips, p.chunks);
  p.chunks = ceil_div(p.strips, p.chunk);
  p.columns_at = p.chunk * p.strip_bytes;
  p.rows_at = p.columns_at + p.columns * p.groups * lanes * 4;
  p.steps_at = p.rows_at + p.groups * 4 * static_cast<int64_t>(sizeof(uint8_t*) + sizeof(int64_t));
  p.zeros_at = round_up(p.steps_at + p.steps * 8, 64);
  p.bytes = p.zeros_at + lanes;
  return p;
}

// Weights, steps and sums of a strip in the order of its lanes, four neighbouring channels at a time, and whether its
// codes can be made with the fast conversion: all results are numbers far inside int32.
template <class Strip>
void prepare(const Conv2dArgs& a, const Plan& p, int64_t first, uint8_t* memory) {
  typedef uint32_t Words4 __attribute__((vector_size(16)));
  typedef float Floats4 __attribute__((vector_size(16)));
  typedef int32_t Ints4 __attribute__((vector_size(16)));
  const PackedLayout& l = a.layout;
  const int64_t part_pitch = p.steps * p.rows * part_bytes;
  const uint32_t zero = static_cast<uint32_t>(*a.epilogue.x_zero), shift = static_cast<uint32_t>(a.stride_h * 8);
  const float x_step = *a.epilogue.x_step, most_sum = static_cast<float>(a.shape.taps()) * (255.0f * 128.0f);
  const float inverse = a.epilogue.out_step ? 1.0f / *a.epilogue.out_step : 1.0f;
  Ints4 tame = ~Ints4{};
  for (int64_t lane = 0; lane < Strip::channels; lane += 4) {
    const int64_t n = first + lane_channel<Strip>(lane), valid = a.shape.n - n, i = n % block;
    uint8_t* const scales = memory + p.scale_at + lane * 4;
    const uint8_t* codes = a.weight + l.code_at(n / block, 0, i);
    const int64_t step_pitch = p.rows * part_bytes;
    uint8_t* to = memory + lane / part_lanes * part_pitch + lane % part_lanes * 4;
    for (int64_t kx = 0; kx < a.shape.kw; ++kx) {
      Words4 before = {};
      for (int64_t g = 0; g < p.groups; ++g, to += step_pitch, codes += PackedLayout::vector) {
        const Words4 taps = valid > 0 ? load<Words4>(codes) : Words4{};
        std::memcpy(to, &taps, sizeof taps);
        if (p.rows == 1) continue;
        // The next row of results: the same taps, stride_h = 1 to 3 rows below.
        const Words4 below = taps << shift | before >> (32 - shift);
        std::memcpy(to + part_bytes, &below, sizeof below);
        before = taps;
      }
    }
    Words4 start = {};
    Floats4 scale = {}, bias = -Floats4{};  // -0 leaves every sum alone
    if (valid > 0) {
      start = Words4{} - load<Words4>(a.weight + l.sums_at + n * 4) * zero;
      const float* bias_there = a.epilogue.bias ? a.epilogue.bias + n : nullptr;
      if (valid >= 4) {
        scale = load<Floats4>(a.epilogue.weight_step + n);
        if (bias_there) bias = load<Floats4>(bias_there);
      } else {
        for (int64_t c = 0; c < valid; ++c) {
          scale[c] = a.epilogue.weight_step[n + c];
          if (bias_there) bias[c] = bias_there[c];
        }
      }
      scale *= x_step;
    }
    const Floats4 far = ((scale < 0 ? -scale : scale) * most_sum + (bias < 0 ? -bias : bias)) * inverse;
    tame &= far < far_units;  // false for NaN
    std::memcpy(scales, &start, sizeof start);
    std::memcpy(scales + Strip::channels * 4, &scale, sizeof scale);
    std::memcpy(scales + Strip::channels * 8, &bias, sizeof bias);
  }
  memory[p.tame_at] = tame[0] && tame[1] && tame[2] && tame[3];
}

// The rows of x under a group of rows of results; rows that are not there are a vector of zeros again and again.
class Lines {
 public:
  Lines(const Conv2dArgs& a, const Plan& p, uint8_t* memory)
      : a_(a),
        p_(p),
        rows_(reinterpret_cast<const uint8_t**>(memory + p.rows_at)),
        pitch_(reinterpret_cast<int64_t*>(rows_ + 4 * p.groups)),
        zeros_(memory + p.zeros_at) {}

  void set(int64_t image, int64_t oy, int64_t rows) {
    const int64_t channels = a_.shape.n, used = a_.shape.kh + (rows - 1) * a_.stride_h;
    for (int64_t i = 0; i < 4 * p_.groups; ++i) {
      const int64_t y = oy * a_.stride_h - a_.pad_h + i * a_.dilation_h;
      const bool inside = i < used && y >= 0 && y < a_.h;
      rows_[i] = inside ? a_.x + (image * a_.h + y) * a_.w * channels : zeros_;
      pitch_[i] = inside ? channels : 0;
    }
  }

  // `count` columns of the image from x on, which are inside, channels [first, first + valid).
  template <class Strip>
  QK_INLINE void interleave(int64_t x, int64_t count, int64_t first, int64_t valid, uint8_t* out) const {
    constexpr int64_t group_bytes = Strip::parts * part_bytes;
    const int64_t pitch = p_.groups * group_bytes;
    for (int64_t g = 0; g < p_.groups; ++g, out += group_bytes) {
      const int64_t s0 = pitch_[4 * g], s1 = pitch_[4 * g + 1], s2 = pitch_[4 * g + 2], s3 = pitch_[4 * g + 3];
      // Rows that are not there have pitch 0 and no channels.
      const uint8_t *r0 = rows_[4 * g] + x * s0 + (s0 ? first : 0), *r1 = rows_[4 * g + 1] + x * s1 + (s1 ? first : 0);
      const uint8_t *r2 = rows_[4 * g + 2] + x * s2 + (s2 ? first : 0),
                    *r3 = rows_[4 * g + 3] + x * s3 + (s3 ? first : 0);
      uint8_t* to = out;
      for (int64_t i = 0; i < count; ++i, to += pitch, r0 += s0, r1 += s1, r2 += s2, r3 += s3)
        Strip::interleave(r0, r1, r2, r3, valid, to);
    }
  }

 private:
  const Conv2dArgs& a_;
  const Plan& p_;
  const uint8_t** rows_;
  int64_t* pitch_;
  const uint8_t* zeros_;
};

// Fills the columns of a stretch of results from left to right.
template <class Strip>
class Columns {
 public:
  Columns(const Conv2dArgs& a, const Plan& p, const Lines& lines, int64_t ox, int64_t first, uint8_t* memory)
      : a_(a),
        p_(p),
        lines_(lines),
        x0_(ox * a.stride_w - a.pad_w),
        first_(first),
        valid_(least<int64_t>(Strip::channels, a.shape.n - first)),
        memory_(memory) {}

  QK_INLINE void up_to(int64_t end) {
    constexpr int64_t group_bytes = Strip::parts * part_bytes;
    const int64_t pitch = p_.groups * group_bytes;
    while (done_ < end) {
      const int64_t x =
          p_.dense ? x0_ + done_ : x0_ + done_ / a_.shape.kw * a_.stride_w + done_ % a_.shape.kw * a_.dilation_w;
      int64_t count = 1;
      uint8_t* to = memory_ + done_ * pitch;
      if (x >= 0 && x < a_.w) {
        if (p_.dense) count = least(end - done_, a_.w - x);
        lines_.template interleave<Strip>(x, count, first_, valid_, to);
      } else {
        std::memset(to, *a_.epilogue.x_zero, static_cast<size_t>(pitch));
      }
      done_ += count;
    }
  }

 private:
  const Conv2dArgs& a_;
  const Plan& p_;
  const Lines& lines_;
  int64_t x0_, first_, valid_, done_ = 0;
  uint8_t* memory_;
};

struct TileArgs {
  const uint8_t* columns;
  int64_t pixel_pitch;   // bytes from one result's columns to the next one's
  const int64_t* steps;  // where the codes of each dot product are, in groups of a column
  int64_t step_count;
  const uint8_t* weights;
  int64_t weight_rows;    // of results that the weights are for
  const uint8_t* scales;  // start of the sum, step, bias
  int64_t valid;
};

// put(row, pixel, parts, pixels): what becomes of the parts of one pixel, or, where a pixel has one part, of up to four
// pixels. With `units`, they are units of codes, else sums.
template <class Strip, bool small, bool units, int rows, int pixels, class Put>
QK_INLINE void tile(const TileArgs& a, float inverse, const Put& put) {
  constexpr int parts = Strip::parts, n = rows * pixels, together = 4 / parts;
  Part done[rows][pixels][parts];
#pragma GCC unroll 4
  for (int j = 0; j < parts; ++j) {
    const uint8_t* starts = a.scales + j * part_bytes;
    const uint8_t* w = a.weights + j * a.step_count * a.weight_rows * part_bytes;
    const uint8_t* columns = a.columns + j * part_bytes;
    Part acc[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) acc[i] = load_part(starts);
    for (int64_t s = 0; s < a.step_count; ++s, w += a.weight_rows * part_bytes) {
      const uint8_t* x = columns + a.steps[s] * (parts * part_bytes);
      Part weight[rows];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) weight[r] = load_part(w + r * part_bytes);
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) {
        const Part code = load_part(x + i * a.pixel_pitch);
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) acc[r * pixels + i] = dot_part<small>(acc[r * pixels + i], code, weight[r]);
      }
    }
    if constexpr (units) {
      const float* step = reinterpret_cast<const float*>(starts + parts * part_bytes);
      const float* bias = reinterpret_cast<const float*>(starts + 2 * parts * part_bytes);
      to_units<n>(acc, step, bias, inverse);
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < pixels; ++i) done[r][i][j] = acc[r * pixels + i];
  }
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < pixels; i += together) put(r, i, done[r][i], pixels - i < together ? pixels - i : together);
}

// One worker.
template <bool small, class Finish>
class Worker {
 public:
  Worker(const Conv2dArgs& a, const Plan& p, const Finish& finish, uint8_t* memory)
      : a_(a), p_(p), finish_(finish), limits_(code_limits(a.epilogue)), memory_(memory), lines_(a, p, memory) {
    std::memset(memory + p.zeros_at, *a.epilogue.x_zero, Wide<true>::channels);
    int64_t* steps = reinterpret_cast<int64_t*>(memory + p.steps_at);
    for (int64_t kx = 0, s = 0; kx < a.shape.kw; ++kx)
      for (int64_t g = 0; g < p.groups; ++g, ++s) steps[s] = kx * (p.dense ? a.dilation_w : 1) * p.groups + g;
  }

  void units(int64_t begin, int64_t end) {
    const int64_t groups = a_.batch * p_.row_groups;
    int64_t chunk = -1, first = 0, last = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (unit / groups != chunk) {
        chunk = unit / groups;
        first = chunk * p_.chunk;
        last = least(p_.strips, first + p_.chunk);
        for (int64_t s = first; s < last; ++s)
          with_strip(s, [&](auto strip, int64_t n) { prepare<decltype(strip)>(a_, p_, n, prepared(s - first)); });
      }
      const int64_t image = unit % groups / p_.row_groups, oy = unit % groups % p_.row_groups * p_.rows;
      const int64_t rows = least(p_.rows, a_.oh - oy);
      lines_.set(image, oy, rows);
      for (int64_t s = first; s < last; ++s) {
        const uint8_t* weights = prepared(s - first);
        const bool codes = a_.epilogue.out_step && !a_.epilogue.residual && weights[p_.tame_at];
        with_strip(s, [&](auto strip, int64_t n) {
          using Strip = decltype(strip);
          if (rows == 2)
            codes ? line<Strip, true, 2>(weights, image, oy, n) : line<Strip, false, 2>(weights, image, oy, n);
          else
            codes ? line<Strip, true, 1>(weights, image, oy, n) : line<Strip, false, 1>(weights, image, oy, n);
        });
      }
    }
  }

 private:
  uint8_t* prepared(int64_t strip) const { return memory_ + strip * p_.strip_bytes; }

  // body(its type, its first channel)
  template <class Body>
  void with_strip(int64_t strip, const Body& body) const {
    constexpr int64_t wide = Wide<true>::channels, narrow = Narrow<true>::channels;
    const int64_t n = a_.shape.n, whole = n / wide;
    if (strip < whole) return body(Wide<true>(), strip * wide);
    if (n % wide > wide - narrow) return body(Wide<false>(), whole * wide);
    const int64_t first = whole * wide + (strip - whole) * narrow;
    if (first + narrow <= n) return body(Narrow<true>(), first);
    body(Narrow<false>(), first);
  }

  template <class Strip, bool units, int rows>
  void line(const uint8_t* weights, int64_t image, int64_t oy, int64_t first) const {
    constexpr int64_t group_bytes = Strip::parts * part_bytes;
    const int64_t pixel_pitch = p_.pixel_step * p_.groups * group_bytes;
    const int64_t last_column = p_.dense ? (a_.shape.kw - 1) * a_.dilation_w + 1 : a_.shape.kw;
    uint8_t* const memory = memory_ + p_.columns_at;
    TileArgs t{
        memory,  pixel_pitch,           reinterpret_cast<const int64_t*>(memory_ + p_.steps_at), p_.steps, weights,
        p_.rows, weights + p_.scale_at, least<int64_t>(Strip::channels, a_.shape.n - first)};
    for (int64_t ox = 0; ox < a_.ow; ox += p_.width) {
      Columns<Strip> columns(a_, p_, lines_, ox, first, memory);
      const int64_t count = least(p_.width, a_.ow - ox);
      int64_t out = ((image * a_.oh + oy) * a_.ow + ox) * a_.shape.n + first;
      t.columns = memory;
      for (int64_t i = 0; i < count;) {
        const bool many = count - i >= pixels_at_once;
        const int64_t pixels = many ? pixels_at_once : 1;
        columns.up_to((i + pixels - 1) * p_.pixel_step + last_column);
        if (many)
          results<Strip, units, rows, pixels_at_once>(t, out);
        else
          results<Strip, units, rows, 1>(t, out);
        i += pixels;
        t.columns += pixels * pixel_pitch;
        out += pixels * a_.shape.n;
      }
    }
  }

  // Results of `rows` x `pixels`, the first at index `at` of out.
  template <class Strip, bool units, int rows, int pixels>
  void results(const TileArgs& t, int64_t at) const {
    const int64_t channels = a_.shape.n, row_pitch = a_.ow * channels, valid = t.valid;
    if constexpr (units) {
      const StripLimits limits = limits_;
      uint8_t* const out = static_cast<uint8_t*>(a_.out) + at;
      tile<Strip, small, true, rows, pixels>(
          t, limits.inverse, [&](int r, int i, const Part* parts, int together) __attribute__((always_inline)) {
            Strip::store_codes(parts, together, limits, valid, out + r * row_pitch + i * channels, channels);
          });
    } else {
      alignas(64) uint8_t sums[rows * pixels][Strip::channels * 4];
      tile<Strip, small, false, rows, pixels>(
          t, 0.0f, [&](int r, int i, const Part* parts, int together) __attribute__((always_inline)) {
            for (int j = 0; j < together * Strip::parts; ++j)
              store_part(sums[r * pixels + i] + j * part_bytes, parts[j]);
          });
      constexpr int64_t blocks = Strip::channels / block;
      const uint8_t *scales = t.scales + Strip::parts * part_bytes, *biases = scales + Strip::parts * part_bytes;
      for (int64_t b = 0; b * block < valid; ++b) {
        // Lanes of sixteen neighbouring channels, from wherever they are.
        const auto gather = [&](const uint8_t* from, auto* to) {
          for (int64_t j = 0; j < 4; ++j)
            std::memcpy(reinterpret_cast<uint8_t*>(to) + j * 16, from + (j * blocks + b) * 16, 16);
        };
        Floats step, bias;
        gather(scales, &step);
        gather(biases, &bias);
        for (int r = 0; r < rows; ++r)
          for (int i = 0; i < pixels; ++i) {
            Ints sum;
            gather(sums[r * pixels + i], &sum);
            finish_.write(__builtin_convertvector(sum, Floats) * step + bias, a_.out,
                          at + r * row_pitch + i * channels + b * block, valid - b * block);
          }
      }
    }
  }

  const Conv2dArgs& a_;
  const Plan& p_;
  const Finish finish_;
  const StripLimits limits_;
  uint8_t* const memory_;
  Lines lines_;
};

}  // namespace

void depthwise(const Conv2dArgs& a) {
  const Plan p = plan(a, thread_count());
  const int64_t products = p.rows * a.ow * ceil_div(a.shape.n, p.chunks) * a.shape.taps();
  parallel_for(a.batch * p.row_groups * p.chunks, ceil_div(products_per_thread, products),
               [&](int64_t begin, int64_t end) {
                 uint8_t* memory = static_cast<uint8_t*>(thread_scratch(p.bytes));
                 with_finish(a.epilogue, [&](const auto& finish) {
                   const auto work = [&](auto small) {
                     Worker<small, std::decay_t<decltype(finish)>> worker(a, p, finish, memory);
                     worker.units(begin, end);
                   };
                   if (small_weights_help && a.shape.bits < 8)
                     work(std::bool_constant<small_weights_help>());
                   else
                     work(std::false_type());
                 });
               });
}

}  // namespace qk::cpu::QK_ISA
