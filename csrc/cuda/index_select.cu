#include "ops/index_select.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

__global__ void index_select_kernel(IndexSelectArgs a) {
  each_item(a.rows * a.count, [&](int64_t i) {
    const int64_t row = i / a.count, col = a.index[i % a.count];
    a.out[i] = col >= 0 && col < a.cols ? a.codes[row * a.cols + col] : 0;
  });
}

}  // namespace

void index_select(const IndexSelectArgs& a) {
  launch("index_select", index_select_kernel, ceil_div(a.rows * a.count, block_threads), a);
}

}  // namespace qk::cuda
