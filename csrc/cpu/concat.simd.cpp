#include "ops/concat.h"

#include "cpu/codes.h"
#include "cpu/table.h"

namespace qk::cpu::QK_ISA {
namespace {

// The result's code for every code of a part. Returns whether each is the code itself.
bool make_table(const ConcatArgs& a, const ConcatPart& part, uint8_t* table) {
  const Row row(*a.out_step, *a.out_zero, a.out_bits);
  float values[256];
  for (int code = 0; code < 256; ++code) values[code] = static_cast<float>(code - *part.zero) * *part.step;
  to_codes(values, table, 256, row);
  bool same = true;
  for (int code = 0; code < 256; ++code) same &= table[code] == code;
  return same;
}

}  // namespace

void concat(const ConcatArgs& a) {
  const int64_t block = most<int64_t>(1, grain_values / most<int64_t>(1, a.channels));
  int64_t to = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const ConcatPart& part = a.parts[i];
    alignas(64) uint8_t values[256];
    const bool same = make_table(a, part, values);
    const Table table(values);
    const int64_t n = part.channels, begin_channel = to;
    to += n;
    parallel_for(a.pixels, block, [&](int64_t begin, int64_t end) {
      const uint8_t* codes = part.codes + begin * n;
      uint8_t* out = a.out + begin * a.channels + begin_channel;
      for (int64_t pixel = begin; pixel < end; ++pixel, codes += n, out += a.channels)
        same ? copy_row(codes, out, n) : look_up(table, codes, out, n);
    });
  }
}

}  // namespace qk::cpu::QK_ISA
