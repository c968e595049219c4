#include "ops/add.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

__global__ void add_kernel(AddArgs a) {
  each_item(a.values, [&](int64_t i) { put(a.out, __fadd_rn(value_at(a.a, i), value_at(a.b, i)), i); });
}

}  // namespace

void add(const AddArgs& a) { launch("add", add_kernel, ceil_div(a.values, block_threads), a); }

}  // namespace qk::cuda
