#include "cuda/stream.h"

#include <stdexcept>
#include <string>

namespace qk::cuda {

int processors(const char*) { return 2; }

void check_aligned(const char* op, const char* argument, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    throw std::runtime_error(std::string("qk::") + op + ": " + argument + " is not aligned.");
}

}  // namespace qk::cuda
