#include "ops/multiply.h"

#include "core/scratch.h"
#include "cpu/values.h"

namespace qk::cpu::QK_ISA {
namespace {

QK_INLINE Values product(const Values& x, const float* gate) {
  Values y;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&y.v[i], gate + i * lanes, sizeof(Lane));
    y.v[i] = x.v[i] * y.v[i];
  }
  return y;
}

// The gate's values of an image, going round from the first channel again for a strip behind the last.
void read_gate(const MultiplyArgs& a, int64_t image, float* gate) {
  const int64_t begin = image * a.channels;
  for (int64_t c = 0; c < a.channels; ++c) {
    if (a.gate.step)
      gate[c] = static_cast<float>(static_cast<const uint8_t*>(a.gate.data)[begin + c] - *a.gate.zero) * *a.gate.step;
    else
      gate[c] = static_cast<const float*>(a.gate.data)[begin + c];
  }
  for (int64_t i = 0; i < strip; ++i) gate[a.channels + i] = gate[i];
}

// An image is one row of values that the gate goes along with, round and round.
template <bool x_codes, bool codes, bool tame>
void run(const MultiplyArgs& a, const Sink& shared) {
  const int64_t values = a.pixels * a.channels, jobs = (values + grain_values - 1) / grain_values;
  parallel_for(a.images * jobs, 1, [&](int64_t begin, int64_t end) {
    const Source source(a.x);
    const Sink sink = shared;  // a copy stays in registers
    const void* x_data = a.x.data;
    void* out = a.out.data;
    const int64_t channels = a.channels;
    float* gate = static_cast<float*>(thread_scratch((channels + strip) * 4));
    for (int64_t job = begin; job < end; ++job) {
      const int64_t image = job / jobs, first = job % jobs * grain_values;
      if (job == begin || first == 0) read_gate(a, image, gate);
      const int64_t last = image * values + least(first + grain_values, values);
      int64_t at = image * values + first, channel = first % channels;
      for (; at + strip <= last; at += strip) {
        sink.write<codes, tame>(product(source.read<x_codes>(x_data, at), gate + channel), out, at);
        channel += strip;
        if (channel >= channels) channel = channel < 2 * channels ? channel - channels : channel % channels;
      }
      if (at == last) continue;
      float buffer[strip];
      const Values x = source.read<x_codes>(copy_in<x_codes>(buffer, x_data, at, last - at), 0);
      sink.write<codes, tame>(product(x, gate + channel), buffer, 0);
      copy_out<codes>(buffer, out, at, last - at);
    }
  });
}

}  // namespace

void multiply(const MultiplyArgs& a) {
  const Sink sink(a.out, Source(a.x).largest * Source(a.gate).largest);
  with_result(a.out, sink, [&](auto codes, auto tame) {
    with_flag(a.x.step, [&](auto x_codes) {
      if constexpr (!tame || x_codes) run<x_codes, codes, tame>(a, sink);
    });
  });
}

}  // namespace qk::cpu::QK_ISA
