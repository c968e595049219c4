#include "ops/index_put.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

template <class T>
__global__ void index_put_copy_kernel(IndexPutArgs a) {
  each_item(a.rows * a.cols, [&](int64_t i) { static_cast<T*>(a.out.data)[i] = static_cast<const T*>(a.x)[i]; });
}

// A thread a column of a row that is put.
__global__ void index_put_kernel(IndexPutArgs a) {
  each_item(a.rows * a.count, [&](int64_t i) {
    const int64_t row = i / a.count, u = i % a.count, col = a.index[u];
    if (col < 0 || col >= a.cols) return;
    float y = 0.0f;
    for (int64_t p = 0; p < a.terms; ++p) {
      const int64_t source = a.source[p * a.count + u];
      if (source < 0 || source >= a.added_cols) continue;
      const float term = a.added[row * a.added_cols + source];
      y = p ? __fadd_rn(y, term) : term;
    }
    const int64_t at = row * a.cols + col;
    if (a.residual.data) y = __fadd_rn(y, value_at(a.residual, at));
    put(a.out, y, at);
  });
}

}  // namespace

void index_put(const IndexPutArgs& a) {
  if (a.out.data != a.x)
    launch("index_put", a.out.step ? index_put_copy_kernel<uint8_t> : index_put_copy_kernel<float>,
           ceil_div(a.rows * a.cols, block_threads), a);
  if (a.count) launch("index_put", index_put_kernel, ceil_div(a.rows * a.count, block_threads), a);
}

}  // namespace qk::cuda
