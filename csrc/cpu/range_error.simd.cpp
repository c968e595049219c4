#include "ops/range_error.h"

#include "core/math.h"
#include "cpu/chunks.h"
#include "cpu/codes.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_ISA {
namespace {

constexpr int64_t block = 16;  // a chunk is padded to whole blocks of the sum's lanes

enum class Power { one, two, any };

template <Power kind>
float error(const float* __restrict x, int64_t n, Row r, float power) {
  return sum_of(n, [=](int64_t i) {
    const float a = __builtin_fabsf(units_of(x[i], r) * r.step - x[i]);
    return kind == Power::one ? a : kind == Power::two ? a * a : power_of(a, power);
  });
}

template <Power kind>
void errors(const RangeErrorArgs& a) {
  const int64_t chunks = range_error_chunks(a.cols);
  const int64_t work = least(range_error_chunk, a.cols) * a.candidates;
  parallel_for(
      a.rows * chunks, most<int64_t>(1, grain_values / most<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
        alignas(64) float x[range_error_chunk];
        for (int64_t job = begin; job < end; ++job) {
          const int64_t row = job / chunks, col = job % chunks * range_error_chunk;
          const int64_t n = least(range_error_chunk, a.cols - col), padded = (n + block - 1) / block * block;
          widen(a.type, a.x, row * a.cols + col, n, x);
          for (int64_t i = n; i < padded; ++i) x[i] = 0.0f;  // 0 is exact in every range and adds no error
          for (int64_t c = 0; c < a.candidates; ++c) {
            const int64_t at = row * a.candidates + c;
            a.partial[job * a.candidates + c] = error<kind>(x, padded, Row(a.step[at], a.zero[at], a.bits), a.power);
          }
        }
      });
}

}  // namespace

void range_error(const RangeErrorArgs& a) {
  if (a.power == 1.0f)
    errors<Power::one>(a);
  else if (a.power == 2.0f)
    errors<Power::two>(a);
  else
    errors<Power::any>(a);
  const int64_t chunks = range_error_chunks(a.cols);
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t c = 0; c < a.candidates; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += a.partial[(row * chunks + chunk) * a.candidates + c];
      a.out[row * a.candidates + c] = static_cast<float>(sum);
    }
}

}  // namespace qk::cpu::QK_ISA
