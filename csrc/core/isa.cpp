#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(QK_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qk {
namespace {

constexpr Isa all[] = {Isa::generic, Isa::avx2, Isa::avx512vnni, Isa::amx};  // from the slowest to the fastest

#if defined(QK_WITH_AMX)
// The processor has tiles and their products of 8 bits and of bfloat16, the system saves them, and this process may use
// them: Linux gives 8 KB of state a thread only to who asks.
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  if ((d & needed) != needed) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;
  if ((low & tile_state) != tile_state) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#if defined(__x86_64__)
// F16C: older compilers do not let __builtin_cpu_supports ask for it.
bool converts_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
    case Isa::avx512vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::amx: {
#if defined(QK_WITH_AMX)
      static const bool granted = runs_here(Isa::avx512vnni) && tiles_granted();
      return granted;
#else
      return false;
#endif
    }
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
    case Isa::amx: return "amx";
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
