#include "ops/quantize_rows.h"

#include "cpu/chunks.h"
#include "cpu/codes.h"

namespace qk::cpu::QK_ISA {
namespace {

struct Range {
  float low, high;  // of the finite values and 0
};

Range range_of(const float* x, int64_t n) {
  constexpr int lanes = 32;
  float lows[lanes] = {}, highs[lanes] = {};
  const auto one = [&](float value, float& low, float& high) {
    const float finite = value - value == 0.0f ? value : 0.0f;
    low = finite < low ? finite : low;
    high = finite > high ? finite : high;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes; ++j) one(x[i + j], lows[j], highs[j]);
  for (int j = 0; i + j < n; ++j) one(x[i + j], lows[j], highs[j]);
  for (int j = 1; j < lanes; ++j) {
    lows[0] = least(lows[0], lows[j]);
    highs[0] = most(highs[0], highs[j]);
  }
  return {lows[0], highs[0]};
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& a) {
  each_row(a.rows, a.cols, [&](int64_t row) {
    const float* x = a.x + row * a.cols;
    const Range range = range_of(x, a.cols);
    const float step = step_of_range(range.low, range.high, a.bits);
    const int32_t zero = zero_of_range(range.low, step, a.bits);
    a.step[row] = step;
    a.zero[row] = zero;
    to_codes(x, a.codes + row * a.cols, a.cols, Row(step, zero, a.bits));
  });
}

}  // namespace qk::cpu::QK_ISA
