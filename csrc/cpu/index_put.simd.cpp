#include "ops/index_put.h"

#include "core/scratch.h"
#include "cpu/values.h"

namespace qk::cpu::QK_ISA {
namespace {

#if defined(__AVX512BW__)
// Of one row: the terms of sixteen columns at a time.
QK_INLINE void terms_of(const IndexPutArgs& a, const float* added, float* y) {
  for (int64_t u = 0; u < a.count; u += 16) {
    const __mmask16 there = static_cast<__mmask16>(a.count - u < 16 ? (1u << (a.count - u)) - 1 : 0xffff);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < a.terms; ++p) {
      const __m512i source = _mm512_maskz_loadu_epi32(there, a.source + p * a.count + u);
      const __mmask16 given = _mm512_mask_cmpge_epi32_mask(there, source, _mm512_setzero_si512());
      const __m512 term = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), given, source, added, 4);
      sum = p ? _mm512_mask_add_ps(sum, given, sum, term) : term;
    }
    _mm512_mask_storeu_ps(y + u, there, sum);
  }
}
#else
QK_INLINE void terms_of(const IndexPutArgs& a, const float* added, float* y) {
  for (int64_t u = 0; u < a.count; ++u) y[u] = 0.0f;
  for (int64_t p = 0; p < a.terms; ++p) {
    const int32_t* const source = a.source + p * a.count;
    for (int64_t u = 0; u < a.count; ++u)
      if (source[u] >= 0) y[u] = p ? y[u] + added[source[u]] : added[source[u]];
  }
}
#endif

// y of a row's columns, one behind the other.
QK_INLINE void sums(const IndexPutArgs& a, int64_t r, float* y) {
  terms_of(a, a.added + r * a.added_cols, y);
  if (!a.residual.data) return;
  const int64_t at = r * a.cols;
  if (!a.residual.step) {
    for (int64_t u = 0; u < a.count; ++u) y[u] += static_cast<const float*>(a.residual.data)[at + a.index[u]];
    return;
  }
  const uint8_t* const codes = static_cast<const uint8_t*>(a.residual.data) + at;
  const float step = *a.residual.step;
  const int32_t zero = *a.residual.zero;
  for (int64_t u = 0; u < a.count; ++u) y[u] += static_cast<float>(codes[a.index[u]] - zero) * step;
}

constexpr int64_t batch_values = 512;  // whose sums are made before they become results, a strip at a time

template <class T>
void run(const IndexPutArgs& args, const Sink& shared) {
  constexpr bool codes = sizeof(T) == 1;
  const int64_t grain = args.cols < grain_values ? grain_values / args.cols : 1;
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    const IndexPutArgs a = args;
    const Sink sink = shared;  // copies that what is written cannot change
    const T* const x = static_cast<const T*>(a.x);
    T* const out = static_cast<T*>(a.out.data);
    const int64_t cols = a.cols, count = a.count;
    if (out != x)
      std::memcpy(out + begin * cols, x + begin * cols, static_cast<size_t>((end - begin) * cols) * sizeof(T));
    if (count == 0) return;
    const int64_t batch = count < batch_values ? batch_values / count : 1;
    const int64_t padded = (batch * count + strip - 1) / strip * strip;
    float* const y = static_cast<float*>(thread_scratch(padded * 8));
    T* const results = reinterpret_cast<T*>(y + padded);
    for (int64_t i = 0; i < padded; ++i) y[i] = 0.0f;
    for (int64_t first = begin; first < end; first += batch) {
      const int64_t rows = least(batch, end - first);
      for (int64_t r = 0; r < rows; ++r) sums(a, first + r, y + r * count);
      for (int64_t i = 0; i < rows * count; i += strip) {
        Values v;
        std::memcpy(&v, y + i, sizeof v);
        sink.write<codes, false>(v, results, i);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < count; ++u) out[(first + r) * cols + a.index[u]] = results[r * count + u];
    }
  });
}

}  // namespace

void index_put(const IndexPutArgs& args) {
  const Sink sink(args.out, __builtin_inff());
  if (args.out.step)
    run<uint8_t>(args, sink);
  else
    run<float>(args, sink);
}

}  // namespace qk::cpu::QK_ISA
