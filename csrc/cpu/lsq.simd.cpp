#include "ops/lsq.h"

#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_ISA {
namespace {

void fake_quantize(const float* __restrict x, float* __restrict out, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) out[i] = units_of(x[i], r) * r.step;
}

// d out / d step is round(t) - t inside, the limit outside; d out / d x is 1 inside, 0 outside (LSQ, section 2.1).
template <bool by_code>
float gradients(const float* __restrict grad, const float* __restrict x, float* __restrict grad_x, int64_t n, Row r) {
  return sum_of(n, [=](int64_t i) {
    const float t = x[i] * r.inverse;
    const float code = round_even(clamp_units(t, r.low, r.high));
    // By code: round(t) in [low, high], which a clamp half a step wider tells apart (ties at low - 1/2 and high + 1/2
    // go to the even neighbour).
    const float wide = by_code ? round_even(clamp_units(t, r.low - 1, r.high + 1)) : 0.0f;
    const bool inside = by_code ? (wide >= r.low) & (wide <= r.high) & (t == t) : (t > r.low) & (t < r.high);
    const float d = inside ? code - t : code;  // code is 0 for NaN
    grad_x[i] = inside ? grad[i] : 0.0f;
    return grad[i] * d;
  });
}

}  // namespace

void lsq(const LsqArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    FloatChunk floats(a.type, at, n);
    fake_quantize(floats.read<0>(a.x), floats.write<1>(a.out), n, Row(a.step[row], a.zero[row], a.bits));
    floats.leave<1>(a.out);
  });
}

void lsq_backward(const LsqBackwardArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t job) {
    const Row r(a.step[row], a.zero[row], a.bits);
    FloatChunk floats(a.type, at, n);
    const float *grad = floats.read<0>(a.grad), *x = floats.read<1>(a.x);
    float* grad_x = floats.write<2>(a.grad_x);
    a.partial[job] =
        a.inside_by_code ? gradients<true>(grad, x, grad_x, n, r) : gradients<false>(grad, x, grad_x, n, r);
    floats.leave<2>(a.grad_x);
  });
  const int64_t chunks = sum_chunks(a.cols);
  for (int64_t row = 0; row < a.rows; ++row) a.grad_step[row] = total(a.partial + row * chunks, chunks) * a.grad_scale;
}

}  // namespace qk::cpu::QK_ISA
