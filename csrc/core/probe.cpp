#include "core/probe.h"

namespace qk {

int64_t probe_products(int64_t rounds) {
  int64_t operations = 0;
  cpu::probe({rounds, &operations});
  return operations;
}

}  // namespace qk
