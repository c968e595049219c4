// How a convolution gets the rows of its matrix product. A pure function: tests/ops/test_conv2d.py.
#pragma once
#include <cstdint>

#include "core/layout.h"

namespace qk {

struct ConvGeometry {
  int64_t h, w, oh, ow;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

enum class ConvRows {
  in_place,  // a kernel of one tap: pixels of x as they lie
  lines,     // a copy of the image's rows with their padding: a row of the kernel is one stretch of it
  packed,    // every row is put together: dilation along W, groups along K, far padding
};

constexpr int64_t reach(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }

constexpr ConvRows conv_rows(const WeightShape& w, const ConvGeometry& g) {
  if (w.k_groups > 1) return ConvRows::packed;
  // Pixels a multiple of 4 KiB apart share a cache set. Steps of 4 codes must not read what is not the caller's to
  // give.
  const bool steps = w.c % 4 == 0 && w.c * w.groups * g.stride_w % 4096 != 0;
  if (w.taps() == 1 && g.pad_h == 0 && g.pad_w == 0) return steps ? ConvRows::in_place : ConvRows::packed;
  // Rows of the kernel that are not one stretch, or copies out of proportion.
  if (g.dilation_w > 1 && w.kw > 1) return ConvRows::packed;
  const int64_t padded = (g.ow - 1) * g.stride_w + reach(w.kw, g.dilation_w);
  if (padded > 4 * g.w + 64 || reach(w.kh, g.dilation_h) > 256 || padded * w.c > (int64_t{1} << 20))
    return ConvRows::packed;
  return ConvRows::lines;
}

}  // namespace qk
