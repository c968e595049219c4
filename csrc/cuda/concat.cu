#include "ops/concat.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

// One part, from channel `begin` of the result on.
__global__ void concat_kernel(ConcatArgs a, ConcatPart part, int64_t begin) {
  const Row row = row_of(*a.out_step, *a.out_zero, a.out_bits);
  const Operand operand{part.codes, part.step, part.zero};
  each_item(a.pixels * part.channels, [&](int64_t i) {
    a.out[i / part.channels * a.channels + begin + i % part.channels] = code_of(value_at(operand, i), row);
  });
}

}  // namespace

void concat(const ConcatArgs& a) {
  int64_t begin = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const ConcatPart& part = a.parts[i];
    launch("concat", concat_kernel, ceil_div(a.pixels * part.channels, block_threads), a, part, begin);
    begin += part.channels;
  }
}

}  // namespace qk::cuda
