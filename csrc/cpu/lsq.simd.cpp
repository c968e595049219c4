#include "ops/lsq.h"

#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

struct Row {
  float inverse, step, low, high;
  Row(float s, int32_t zero, int bits) : inverse(1.0f / s), step(s), low(-zero), high(top_code(bits) - zero) {}
};

void fake_quantize(const float* __restrict x, float* __restrict out, int64_t n, Row r) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_even(clamp_units(x[i] * r.inverse, r.low, r.high)) * r.step;
}

// d out / d step is round(t) - t inside, the limit outside; d out / d x is 1 inside, 0 outside (LSQ, section 2.1).
template <bool by_code>
float gradients(const float* __restrict grad, const float* __restrict x, float* __restrict grad_x, int64_t n, Row r) {
  constexpr int lanes = 16;  // fixed for every instruction set: the order of the sum is part of the result
  float sums[lanes] = {};
  const auto one = [&](int64_t i, float& sum) {
    const float t = x[i] * r.inverse;
    const float code = round_even(clamp_units(t, r.low, r.high));
    // By code: round(t) in [low, high], which a clamp half a step wider tells apart (ties at low - 1/2 and high + 1/2
    // go to the even neighbour).
    const float wide = by_code ? round_even(clamp_units(t, r.low - 1, r.high + 1)) : 0.0f;
    const bool inside = by_code ? (wide >= r.low) & (wide <= r.high) & (t == t) : (t > r.low) & (t < r.high);
    const float d = inside ? code - t : (t == t ? code : 0.0f);
    sum += grad[i] * d;
    grad_x[i] = inside ? grad[i] : 0.0f;
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes; ++j) one(i + j, sums[j]);
  for (int j = 0; i + j < n; ++j) one(i + j, sums[j]);
  for (int width = lanes / 2; width; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// Jobs are chunks of a row; short rows share a call.
int64_t grain(int64_t cols) { return most<int64_t>(1, grain_values / most<int64_t>(1, least(sum_chunk, cols))); }

}  // namespace

void lsq(const LsqArgs& a) {
  const int64_t chunks = sum_chunks(a.cols);
  parallel_for(a.rows * chunks, grain(a.cols), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / chunks, col = job % chunks * sum_chunk;
      const int64_t at = row * a.cols + col;
      fake_quantize(a.x + at, a.out + at, least(sum_chunk, a.cols - col), Row(a.step[row], a.zero[row], a.bits));
    }
  });
}

void lsq_backward(const LsqBackwardArgs& a) {
  const int64_t chunks = sum_chunks(a.cols);
  parallel_for(a.rows * chunks, grain(a.cols), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / chunks, col = job % chunks * sum_chunk;
      const int64_t at = row * a.cols + col, n = least(sum_chunk, a.cols - col);
      const Row r(a.step[row], a.zero[row], a.bits);
      a.partial[job] = a.inside_by_code ? gradients<true>(a.grad + at, a.x + at, a.grad_x + at, n, r)
                                        : gradients<false>(a.grad + at, a.x + at, a.grad_x + at, n, r);
    }
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[row * chunks + chunk];
    a.grad_step[row] = static_cast<float>(sum) * a.grad_scale;
  }
}

}  // namespace qk::cpu::QK_ISA
