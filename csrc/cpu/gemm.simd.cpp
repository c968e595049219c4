#include "ops/gemm.h"

#include "cpu/igemm.h"

namespace qk::cpu::QK_ISA {

void gemm(const GemmArgs& a) {
  const int64_t k = a.layout.k;
  multiply({a.weight, a.layout, a.epilogue, a.m, a.shape.n, a.out},
           [&](uint8_t* panels, int64_t, int64_t first, int64_t count) {
             for (int64_t r = 0; r < count; ++r) RowWriter(panels, r, a.layout).copy(a.x + (first + r) * k, k);
           });
}

}  // namespace qk::cpu::QK_ISA
