#include "ops/fisher_loss.h"

#include "cpu/chunks.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_ISA {
namespace {

template <bool weighted>
float loss(const float* __restrict output, const float* __restrict target, const float* __restrict weight,
           float* __restrict slope, int64_t n, float twice) {
  return sum_of(n, [=](int64_t i) {
    const float d = output[i] - target[i];
    const float weighed = weighted ? weight[i] * d : d;
    slope[i] = twice * weighed;
    return weighed * d;
  });
}

}  // namespace

void fisher_loss(const FisherLossArgs& a) {
  const float twice = 2.0f * a.scale;
  each_chunk(1, a.n, [&](int64_t, int64_t at, int64_t n, int64_t job) {
    FloatChunk floats(a.type, at, n);
    const float *output = floats.read<0>(a.output), *target = floats.read<1>(a.target);
    float* slope = a.slope + at;
    a.partial[job] = a.weight ? loss<true>(output, target, floats.read<2>(a.weight), slope, n, twice)
                              : loss<false>(output, target, nullptr, slope, n, twice);
  });
  *a.out = a.scale * total(a.partial, sum_chunks(a.n));
}

}  // namespace qk::cpu::QK_ISA
