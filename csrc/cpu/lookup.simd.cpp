#include "ops/lookup.h"

#include "cpu/table.h"

namespace qk::cpu::QK_ISA {

void lookup(const LookupArgs& a) {
  parallel_for(a.values, grain_values, [&](int64_t begin, int64_t end) {
    if (!a.floats) {
      const Table table(static_cast<const uint8_t*>(a.table));
      return look_up(table, a.codes + begin, static_cast<uint8_t*>(a.out) + begin, end - begin);
    }
    const float* table = static_cast<const float*>(a.table);
    float* out = static_cast<float*>(a.out);
    for (int64_t i = begin; i < end; ++i) out[i] = table[a.codes[i]];
  });
}

}  // namespace qk::cpu::QK_ISA
