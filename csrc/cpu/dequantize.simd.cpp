#include "ops/dequantize.h"

#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

void to_floats(const uint8_t* __restrict codes, float* __restrict out, int64_t n, float step, float zero) {
  for (int64_t i = 0; i < n; ++i) out[i] = (static_cast<float>(codes[i]) - zero) * step;
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
  each_chunk(a.rows, a.cols, [&](int64_t row, int64_t at, int64_t n, int64_t) {
    to_floats(a.codes + at, a.out + at, n, a.step[row], static_cast<float>(a.zero[row]));
  });
}

}  // namespace qk::cpu::QK_ISA
