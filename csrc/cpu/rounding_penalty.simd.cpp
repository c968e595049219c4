#include "ops/rounding_penalty.h"

#include "core/math.h"
#include "cpu/chunks.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_ISA {
namespace {

float penalty(const float* __restrict v, int64_t n, float beta) {
  return sum_of(n, [=](int64_t i) { return 1.0f - power_of(__builtin_fabsf(soft_sign(v[i])), beta); });
}

void gradients(const float* __restrict v, float* __restrict grad_v, int64_t n, float beta, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = soft_sign(v[i]);
    grad_v[i] = scale * penalty_slope(u, soft_slope(u), beta);
  }
}

}  // namespace

void rounding_penalty(const RoundingPenaltyArgs& a) {
  each_chunk(1, a.n, [&](int64_t, int64_t at, int64_t n, int64_t job) {
    FloatChunk floats(a.type, at, n);
    a.partial[job] = penalty(floats.read<0>(a.v), n, a.beta);
  });
  *a.out = total(a.partial, sum_chunks(a.n));
}

void rounding_penalty_backward(const RoundingPenaltyBackwardArgs& a) {
  const float scale = -2.0f * a.beta * *a.grad;
  each_chunk(1, a.n, [&](int64_t, int64_t at, int64_t n, int64_t) {
    FloatChunk floats(a.type, at, n);
    gradients(floats.read<0>(a.v), floats.write<1>(a.grad_v), n, a.beta, scale);
    floats.leave<1>(a.grad_v);
  });
}

}  // namespace qk::cpu::QK_ISA
