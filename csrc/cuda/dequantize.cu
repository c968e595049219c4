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

}  // namespace

void dequantize(const DequantizeArgs& a) {
  with_chunks(a.rows, a.cols,
              [&](int64_t blocks, auto team) { launch("dequantize", dequantize_kernel<team>, blocks, a); });
}

}  // namespace qk::cuda
