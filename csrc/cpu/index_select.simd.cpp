#include "ops/index_select.h"

#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {

void index_select(const IndexSelectArgs& args) {
  const int64_t grain = args.count < grain_values ? grain_values / args.count : 1;
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    const IndexSelectArgs a = args;  // a copy that the bytes written cannot change
    for (int64_t r = begin; r < end; ++r)
      for (int64_t j = 0; j < a.count; ++j) a.out[r * a.count + j] = a.codes[r * a.cols + a.index[j]];
  });
}

}  // namespace qk::cpu::QK_ISA
