// Indices of columns, as operators and programs check them.
#pragma once
#include <string>

#include "core/check.h"

namespace qk {

// Fails on the first that is not from `least` to cols - 1.
inline void check_inside(const char* op, const char* name, const int32_t* index, int64_t count, int32_t least,
                         int64_t cols) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < least || index[i] >= cols)
      fail(op, name, "a column from " + std::to_string(least) + " to " + std::to_string(cols - 1),
           std::to_string(index[i]) + " at " + std::to_string(i));
}

// int32, dense. Their numbers are looked at on the CPU.
inline Tensor check_columns(const char* op, const char* name, const Tensor& index, int32_t least, int64_t cols) {
  check_dtype(op, name, index, ScalarType::Int);
  const Tensor found = dense(index);
  if (found.is_cpu()) check_inside(op, name, found.const_data_ptr<int32_t>(), found.numel(), least, cols);
  return found;
}

}  // namespace qk
