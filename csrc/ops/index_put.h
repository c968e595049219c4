#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "ops/values.h"

namespace qk {

// out = x but for the columns index[u], which get the result of y: the sum of added[source[p, u]] for p in order, each
// sum rounded, without those below 0, plus the residual's value there. It may lie where x lies.
struct IndexPutArgs {
  const void* x;                  // [rows, cols] of the result's type
  const float* added;             // [rows, added_cols]
  const int32_t *index, *source;  // [count], [terms, count]; on CUDA a column that there is not is left out
  Operand residual;               // [rows, cols]; no data: none
  Result out;                     // [rows, cols]
  int64_t rows, cols, added_cols, count, terms;
};

}  // namespace qk

QK_KERNEL(index_put, qk::IndexPutArgs)
