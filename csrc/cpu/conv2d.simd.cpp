#include "ops/conv2d.h"

#include "core/conv_rows.h"
#include "cpu/igemm.h"

namespace qk::cpu::QK_ISA {
namespace {

// Rows of the matrix product: the codes under the kernel at one output pixel.
void pack_pixels(const Conv2dArgs& a, uint8_t* rows, int64_t outer, int64_t first, int64_t count) {
  const int64_t c = a.shape.c, channels = c * a.shape.groups;
  const uint8_t zero = static_cast<uint8_t>(*a.epilogue.x_zero);
  // Neighbours in W are neighbours in memory: a row of the kernel is one copy.
  const bool joined = a.dilation_w == 1 && a.shape.groups == 1;
  int64_t ox = first % a.ow, oy = first / a.ow % a.oh, b = first / a.ow / a.oh;
  for (int64_t r = 0; r < count; ++r) {
    RowWriter row(rows + r * packed_row_pitch(a.layout), a.layout);
    const int64_t x0 = ox * a.stride_w - a.pad_w, y0 = oy * a.stride_h - a.pad_h;
    for (int64_t ky = 0; ky < a.shape.kh; ++ky) {
      const int64_t y = y0 + ky * a.dilation_h;
      if (y < 0 || y >= a.h) {
        row.fill(zero, a.shape.kw * c);
        continue;
      }
      const uint8_t* line = a.x + (b * a.h + y) * a.w * channels + outer * c;
      if (joined) {
        const int64_t left = least(a.shape.kw, most<int64_t>(0, -x0));
        const int64_t inside = most<int64_t>(0, least(a.shape.kw, a.w - x0) - left);
        row.fill(zero, left * c);
        row.copy(line + (x0 + left) * c, inside * c);
        row.fill(zero, (a.shape.kw - left - inside) * c);
        continue;
      }
      for (int64_t kx = 0; kx < a.shape.kw; ++kx) {
        const int64_t x = x0 + kx * a.dilation_w;
        if (x < 0 || x >= a.w)
          row.fill(zero, c);
        else
          row.copy(line + x * channels, c);
      }
    }
    if (++ox == a.ow) {
      ox = 0;
      if (++oy == a.oh) oy = 0, ++b;
    }
  }
}

void packed_rows(const void* self, Piece* pieces) {
  packed_pieces(static_cast<const Conv2dArgs*>(self)->layout, pieces);
}

int64_t fill_packed(const void* self, uint8_t* memory, int64_t outer, int64_t first, int64_t count, Run* runs) {
  const Conv2dArgs& a = *static_cast<const Conv2dArgs*>(self);
  pack_pixels(a, memory, outer, first, count);
  runs[0] = {memory, packed_row_pitch(a.layout), count};
  return 1;
}

// Pixels of x where they lie.
void whole_row(const void* self, Piece* piece) { *piece = {0, 0, static_cast<const Conv2dArgs*>(self)->shape.c}; }

// run(image, oy, ox, count) for each row of results that [first, first + count) meets; returns how many.
template <class F>
int64_t each_line(const Conv2dArgs& a, int64_t first, int64_t count, const F& run) {
  int64_t ox = first % a.ow, oy = first / a.ow % a.oh, image = first / a.ow / a.oh, lines = 0;
  for (; count > 0; ++lines) {
    const int64_t n = least(count, a.ow - ox);
    run(image, oy, ox, n);
    count -= n;
    ox = 0;
    if (++oy == a.oh) oy = 0, ++image;
  }
  return lines;
}

int64_t fill_in_place(const void* self, uint8_t*, int64_t outer, int64_t first, int64_t count, Run* runs) {
  const Conv2dArgs& a = *static_cast<const Conv2dArgs*>(self);
  const int64_t channels = a.shape.c * a.shape.groups;
  const uint8_t* x = a.x + outer * a.shape.c;
  if (a.stride_h == 1 && a.stride_w == 1) {
    runs[0] = {x + first * channels, channels, count};
    return 1;
  }
  return each_line(a, first, count, [&](int64_t image, int64_t oy, int64_t ox, int64_t n) {
    const int64_t pixel = (image * a.h + oy * a.stride_h) * a.w + ox * a.stride_w;
    *runs++ = {x + pixel * channels, a.stride_w * channels, n};
  });
}

// The image's rows with their padding, the channels of one group. Rows of results that follow each other share them.
struct Lines {
  int64_t reach_h, step_h;  // rows under a row of results; from one row of results to the next
  int64_t width, pitch;     // pixels; bytes of a row

  explicit Lines(const Conv2dArgs& a)
      : reach_h(reach(a.shape.kh, a.dilation_h)),
        step_h(least(a.stride_h, reach_h)),
        width((a.ow - 1) * a.stride_w + reach(a.shape.kw, a.dilation_w)),
        pitch(round_up(width * a.shape.c, 64)) {}

  // Bytes for `rows` pixels: row_bytes * rows + fixed_bytes. Every image begins with reach_h rows of its own.
  int64_t row_bytes(const Conv2dArgs& a) const { return ceil_div(pitch * (step_h * a.oh + reach_h), a.oh * a.ow); }
  int64_t fixed_bytes() const { return 2 * pitch * (step_h + reach_h) + 64; }
};

// Columns [begin, end) of a padded row.
void copy_line(const Conv2dArgs& a, int64_t image, int64_t y, int64_t outer, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t c = a.shape.c, channels = c * a.shape.groups, zero = *a.epilogue.x_zero;
  const auto fill = [&](int64_t from, int64_t until) {
    if (until > from) std::memset(to + from * c, static_cast<int>(zero), static_cast<size_t>((until - from) * c));
  };
  if (y < 0 || y >= a.h) return fill(begin, end);
  const int64_t left = least(most(begin, a.pad_w), end), right = most(least(end, a.pad_w + a.w), left);
  fill(begin, left);
  const uint8_t* from = a.x + ((image * a.h + y) * a.w + left - a.pad_w) * channels + outer * c;
  if (a.shape.groups == 1)
    std::memcpy(to + left * c, from, static_cast<size_t>((right - left) * c));
  else
    for (int64_t x = left; x < right; ++x, from += channels) move(to + x * c, from, c);
  fill(right, end);
}

void lines_rows(const void* self, Piece* pieces) {
  const Conv2dArgs& a = *static_cast<const Conv2dArgs*>(self);
  const Lines lines(a);
  for (int64_t ky = 0; ky < a.shape.kh; ++ky)
    pieces[ky] = {ky * a.dilation_h * lines.pitch, ky * a.layout.segment_padded, a.layout.segment_k};
}

int64_t fill_lines(const void* self, uint8_t* memory, int64_t outer, int64_t first, int64_t count, Run* runs) {
  const Conv2dArgs& a = *static_cast<const Conv2dArgs*>(self);
  const Lines lines(a);
  const int64_t c = a.shape.c, kernel = lines.width - (a.ow - 1) * a.stride_w;
  const bool one = first % a.ow + count <= a.ow;  // part of a row: only what it needs
  int64_t last_image = -1;
  uint8_t* next = memory;  // behind the rows that are there
  return each_line(a, first, count, [&](int64_t image, int64_t oy, int64_t ox, int64_t n) {
    const int64_t begin = one ? ox * a.stride_w : 0, end = one ? (ox + n - 1) * a.stride_w + kernel : lines.width;
    const int64_t shared = image == last_image ? lines.reach_h - lines.step_h : 0;
    last_image = image;
    uint8_t* const top = next - shared * lines.pitch;
    for (int64_t i = shared; i < lines.reach_h; ++i, next += lines.pitch)
      copy_line(a, image, oy * a.stride_h - a.pad_h + i, outer, begin, end, next);
    *runs++ = {top + ox * a.stride_w * c, a.stride_w * c, n};
  });
}

}  // namespace

void depthwise(const Conv2dArgs& a);
void winograd(const Conv2dArgs& a);

void conv2d(const Conv2dArgs& a) {
  if (a.shape.depthwise()) return depthwise(a);
  if (a.shape.algorithm == Algorithm::winograd) return winograd(a);
  const ConvGeometry g{a.h, a.w, a.oh, a.ow, a.stride_h, a.stride_w, a.pad_h, a.pad_w, a.dilation_h, a.dilation_w};
  Source source{};
  switch (conv_rows(a.shape, g)) {
    case ConvRows::in_place: {
      const bool all = a.stride_h == 1 && a.stride_w == 1;
      source = {&a, 1, 0, 0, all ? 1 : a.ow, whole_row, fill_in_place};
      break;
    }
    case ConvRows::lines: {
      const Lines lines(a);
      source = {&a, a.shape.kh, lines.row_bytes(a), lines.fixed_bytes(), a.ow, lines_rows, fill_lines};
      break;
    }
    case ConvRows::packed: source = {&a, a.layout.segments, packed_row_pitch(a.layout), 0, 1, packed_rows, fill_packed};
  }
  multiply({a.weight, a.layout, a.epilogue, a.batch * a.oh * a.ow, a.shape.n, a.out, source});
}

}  // namespace qk::cpu::QK_ISA
