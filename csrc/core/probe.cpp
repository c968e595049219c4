#include "core/probe.h"

#include <stdexcept>
#include <string>

namespace qk {

int64_t probe_products(int64_t rounds) {
  if (rounds < 0 || rounds > int64_t{1} << 40)
    throw std::runtime_error("qk: rounds must be from 0 to 2^40, got " + std::to_string(rounds) + ".");
  int64_t operations = 0;
  cpu::probe({rounds, &operations});
  return operations;
}

}  // namespace qk
