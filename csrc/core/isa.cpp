#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace qk {
namespace {

constexpr Isa all[] = {Isa::generic, Isa::avx2, Isa::avx512vnni};

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2");
    case Isa::avx512vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

Isa parse(const std::string& name, const char* source) {
  std::string usable;
  for (Isa isa : all) {
    if (!runs_here(isa)) continue;
    if (isa_name(isa) == name) return isa;
    usable += (usable.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error(std::string("qk: ") + source + " must name an instruction set of this machine (" + usable +
                           "), got " + name + ".");
}

Isa choose() {
  const char* wanted = std::getenv("QK_ISA");
  if (wanted && *wanted) return parse(wanted, "QK_ISA");
  Isa best = Isa::generic;
  for (Isa isa : all)
    if (runs_here(isa)) best = isa;
  return best;
}

std::atomic<int> current{-1};

}  // namespace

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512vnni: return "avx512vnni";
  }
  return "unknown";
}

Isa active_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa < 0) current.store(isa = static_cast<int>(choose()), std::memory_order_relaxed);
  return static_cast<Isa>(isa);
}

void force_isa(const std::string& name) {
  current.store(static_cast<int>(name.empty() ? choose() : parse(name, "force_isa")));
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : all)
    if (runs_here(isa)) names.push_back(isa_name(isa));
  return names;
}

}  // namespace qk
