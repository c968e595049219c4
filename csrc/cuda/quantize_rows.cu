#include "ops/quantize_rows.h"

#include "cuda/rows.cuh"

namespace qk::cuda {
namespace {

// A team makes a row: first its range, then its codes; the row is in L2 by then.
template <int team>
__global__ void quantize_rows_kernel(QuantizeRowsArgs a) {
  each_job<team>(a.rows, [&](int64_t row) {
    const float* x = a.x + row * a.cols;
    uint8_t* codes = a.codes + row * a.cols;
    float low = 0, high = 0;  // of the finite values and 0
    each_value<team, 4>(a.cols, values_before<4>(x), [&](int64_t i, auto width) {
      const auto xs = load<width>(x + i);
#pragma unroll
      for (float value : xs.v) {
        const float finite = value - value == 0 ? value : 0.0f;
        low = fminf(low, finite);
        high = fmaxf(high, finite);
      }
    });
    low = team_all<team>(low, [](float one, float other) { return fminf(one, other); });
    high = team_all<team>(high, [](float one, float other) { return fmaxf(one, other); });
    const float step = step_of_range(low, high, a.bits);
    const int32_t zero = zero_of_range(low, step, a.bits);
    if (threadIdx.x % team == 0) {
      a.step[row] = step;
      a.zero[row] = zero;
    }
    const Row r = row_of(step, zero, a.bits);
    each_value<team, 4>(a.cols, values_before<4>(x, codes), [&](int64_t i, auto width) {
      const auto xs = load<width>(x + i);
      Values<uint8_t, width> out;
#pragma unroll
      for (int j = 0; j < width; ++j) out.v[j] = code_of(xs.v[j], r);
      store(codes + i, out);
    });
  });
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& a) {
  with_team(a.rows, a.cols,
            [&](int64_t blocks, auto team) { launch("quantize_rows", quantize_rows_kernel<team>, blocks, a); });
}

}  // namespace qk::cuda
