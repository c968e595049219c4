#include "core/bits.h"

#include <stdexcept>
#include <string>

namespace qk {

void throw_bad_bits(int64_t bits) {
  throw std::runtime_error("qk: storage width must be 2, 4 or 8, got " + std::to_string(bits) + ".");
}

}  // namespace qk
