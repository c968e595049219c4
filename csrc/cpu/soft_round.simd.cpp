#include "ops/soft_round.h"

#include "core/math.h"
#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

struct Row {
  float inverse, step, low, high;
  Row(float s, int32_t zero, int bits) : inverse(1.0f / s), step(s), low(-zero), high(top_code(bits) - zero) {}

  // floor(weight / step) + h, the code less the zero. The floor is exact after a limit that round_even needs, and that
  // lies so far out that no fraction brings a value back between low and high.
  float units(float weight, float u) const {
    const float t = limit(weight * inverse, low - 2, high + 2);
    const float nearest = round_even(t);
    return (nearest > t ? nearest - 1.0f : nearest) + soft_fraction(u);
  }
};

void values(const float* __restrict weight, const float* __restrict v, float* __restrict out, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) out[i] = limit(r.units(weight[i], soft_sign(v[i])), r.low, r.high) * r.step;
}

void gradients(const float* __restrict grad, const float* __restrict weight, const float* __restrict v,
               float* __restrict grad_v, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = soft_sign(v[i]), t = r.units(weight[i], u);
    grad_v[i] = keep_if((t >= r.low) & (t <= r.high), grad[i] * r.step * soft_slope(u));
  }
}

}  // namespace

void soft_round(const SoftRoundArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    values(a.weight + at, a.v + at, a.out + at, n, Row(a.step[row], a.zero[row], a.bits));
  });
}

void soft_round_backward(const SoftRoundBackwardArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    gradients(a.grad + at, a.weight + at, a.v + at, a.grad_v + at, n, Row(a.step[row], a.zero[row], a.bits));
  });
}

}  // namespace qk::cpu::QK_ISA
