#include "cuda/stream.h"

#include <stdexcept>
#include <string>

namespace qk::cuda {
namespace {

int architecture = 120;

}  // namespace

int processors(const char*) { return 2; }
bool has_int4(const char*) { return architecture < 90; }
bool has_warp_groups(const char*, const void*) { return architecture == 90; }

void check_aligned(const char* op, const char* argument, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    throw std::runtime_error(std::string("qk::") + op + ": " + argument + " is not aligned.");
}

}  // namespace qk::cuda

// Called by tests: as in sm_80.
extern "C" __attribute__((visibility("default"))) void emulate_architecture(int number) {
  qk::cuda::architecture = number;
}
