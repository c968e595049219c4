#include "ops/conv2d.h"

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

}  // namespace

void depthwise(const Conv2dArgs& a);
void winograd(const Conv2dArgs& a);

void conv2d(const Conv2dArgs& a) {
  if (a.shape.depthwise()) return depthwise(a);
  if (a.shape.algorithm == Algorithm::winograd) return winograd(a);
  Source source{};
  source.self = &a;
  source.piece_count = a.layout.segments;
  source.row_bytes = packed_row_pitch(a.layout);
  source.row_unit = 1;
  source.pieces = [](const void* self, Piece* p) { packed_pieces(static_cast<const Conv2dArgs*>(self)->layout, p); };
  source.fill = [](const void* self, uint8_t* memory, int64_t outer, int64_t first, int64_t count, Run* runs) {
    const Conv2dArgs& args = *static_cast<const Conv2dArgs*>(self);
    pack_pixels(args, memory, outer, first, count);
    runs[0] = {memory, packed_row_pitch(args.layout), count};
    return int64_t{1};
  };
  multiply({a.weight, a.layout, a.epilogue, a.batch * a.oh * a.ow, a.shape.n, a.out, source});
}

}  // namespace qk::cpu::QK_ISA
