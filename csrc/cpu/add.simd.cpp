#include "ops/add.h"

#include "cpu/values.h"

namespace qk::cpu::QK_ISA {
namespace {

QK_INLINE Values sum(const Values& a, const Values& b) {
  return {{a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]}};
}

template <bool a_codes, bool b_codes, bool codes, bool tame>
void run(const AddArgs& args, const Sink& shared) {
  parallel_for((args.values + strip - 1) / strip, grain_values / strip, [&](int64_t begin, int64_t end) {
    const Source a(args.a), b(args.b);
    const Sink sink = shared;  // a copy stays in registers
    const void *a_data = args.a.data, *b_data = args.b.data;
    void* out = args.out.data;
    const int64_t last = least(end * strip, args.values);
    int64_t at = begin * strip;
    for (; at + strip <= last; at += strip)
      sink.write<codes, tame>(sum(a.read<a_codes>(a_data, at), b.read<b_codes>(b_data, at)), out, at);
    if (at == last) return;
    float one[strip], other[strip];
    const Values x = a.read<a_codes>(copy_in<a_codes>(one, a_data, at, last - at), 0);
    const Values y = b.read<b_codes>(copy_in<b_codes>(other, b_data, at, last - at), 0);
    sink.write<codes, tame>(sum(x, y), one, 0);
    copy_out<codes>(one, out, at, last - at);
  });
}

}  // namespace

void add(const AddArgs& args) {
  const Sink sink(args.out, Source(args.a).largest + Source(args.b).largest);
  with_result(args.out, sink, [&](auto codes, auto tame) {
    with_flag(args.a.step, [&](auto a_codes) {
      with_flag(args.b.step, [&](auto b_codes) {
        if constexpr (!tame || (a_codes && b_codes)) run<a_codes, b_codes, codes, tame>(args, sink);
      });
    });
  });
}

}  // namespace qk::cpu::QK_ISA
