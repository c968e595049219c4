#include "ops/soft_round.h"

#include "core/math.h"
#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_ISA {
namespace {

// floor(weight / step) + h, the code less the zero. The floor is exact after a limit that round_even needs, and that
// lies so far out that no fraction brings a value back between low and high.
inline float soft_units(float weight, float u, const Row& r) {
  const float t = limit(weight * r.inverse, r.low - 2, r.high + 2);
  const float nearest = round_even(t);
  return (nearest > t ? nearest - 1.0f : nearest) + soft_fraction(u);
}

void values(const float* __restrict weight, const float* __restrict v, float* __restrict out, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) out[i] = limit(soft_units(weight[i], soft_sign(v[i]), r), r.low, r.high) * r.step;
}

void gradients(const float* __restrict grad, const float* __restrict weight, const float* __restrict v,
               float* __restrict grad_v, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = soft_sign(v[i]), t = soft_units(weight[i], u, r);
    grad_v[i] = keep_if((t >= r.low) & (t <= r.high), grad[i] * r.step * soft_slope(u));
  }
}

// The same, plus scale times the slope of the penalty: equal to the sum of the two gradients bit for bit.
void gradients_and_penalty(const float* __restrict grad, const float* __restrict weight, const float* __restrict v,
                           float* __restrict grad_v, int64_t n, Row r, float scale, float beta) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = soft_sign(v[i]), t = soft_units(weight[i], u, r), slope = soft_slope(u);
    const float own = keep_if((t >= r.low) & (t <= r.high), grad[i] * r.step * slope);
    grad_v[i] = own + scale * penalty_slope(u, slope, beta);
  }
}

}  // namespace

void soft_round(const SoftRoundArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    FloatChunk floats(a.type, at, n);
    const Row r(a.step[row], a.zero[row], a.bits);
    values(floats.read<0>(a.weight), floats.read<1>(a.v), floats.write<2>(a.out), n, r);
    floats.leave<2>(a.out);
  });
}

void soft_round_backward(const SoftRoundBackwardArgs& a) {
  const float weight = a.penalty ? a.penalty[0] : 0.0f, beta = a.penalty ? a.penalty[1] : 1.0f;
  const float scale = -2.0f * beta * weight;
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    const Row r(a.step[row], a.zero[row], a.bits);
    FloatChunk floats(a.type, at, n);
    const float *grad = floats.read<0>(a.grad), *weights = floats.read<1>(a.weight), *v = floats.read<2>(a.v);
    float* grad_v = floats.write<3>(a.grad_v);
    if (weight == 0) {
      gradients(grad, weights, v, grad_v, n, r);
    } else {
      gradients_and_penalty(grad, weights, v, grad_v, n, r, scale, beta);
    }
    floats.leave<3>(a.grad_v);
  });
}

}  // namespace qk::cpu::QK_ISA
