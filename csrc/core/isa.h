// Which instruction set the CPU kernels use: the best there is, or what QK_ISA (the environment) or force_isa names.
#pragma once
#include <string>
#include <vector>

#define QK_EXPORT __attribute__((visibility("default")))

namespace qk {

enum class Isa { generic, avx2, avx512vnni, amx };

QK_EXPORT Isa active_isa();
// Empty gives the choice back to the environment or the machine. Throws for a name that cannot run here.
QK_EXPORT void force_isa(const std::string& name);
QK_EXPORT std::string isa_name(Isa isa);
QK_EXPORT std::vector<std::string> usable_isas();

}  // namespace qk
