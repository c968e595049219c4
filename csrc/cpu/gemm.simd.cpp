#include "ops/gemm.h"

#include "cpu/igemm.h"

namespace qk::cpu::QK_ISA {
namespace {

// Rows are read in place if they consist of whole steps and do not all share a few cache sets.
bool in_place(const GemmArgs& a) {
  const int64_t k = a.layout.k;
  return a.layout.segment_k % 4 == 0 && (k % 1024 != 0 || a.m <= 4);
}

void pieces(const void* self, Piece* out) {
  // Whole steps: rows as they are have their segments where packed ones have them.
  packed_pieces(static_cast<const GemmArgs*>(self)->layout, out);
}

int64_t fill(const void* self, uint8_t* memory, int64_t, int64_t first, int64_t count, Run* runs) {
  const GemmArgs& a = *static_cast<const GemmArgs*>(self);
  const int64_t k = a.layout.k, pitch = packed_row_pitch(a.layout);
  if (in_place(a)) {
    runs[0] = {a.x + first * k, k, count};
    return 1;
  }
  for (int64_t r = 0; r < count; ++r) RowWriter(memory + r * pitch, a.layout).copy(a.x + (first + r) * k, k);
  runs[0] = {memory, pitch, count};
  return 1;
}

}  // namespace

void gemm(const GemmArgs& a) {
  const int64_t row_bytes = in_place(a) ? 0 : packed_row_pitch(a.layout);
  const Source source{&a, a.layout.segments, row_bytes, 0, 1, pieces, fill};
  multiply({a.weight, a.layout, a.epilogue, a.m, a.shape.n, a.out, source});
}

}  // namespace qk::cpu::QK_ISA
