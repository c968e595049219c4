// What the faces of sparq, sparq_pack and sparq_unpack check alike.
#pragma once
#include "core/check.h"
#include "core/sparq_block.h"

namespace qk {

inline void check_sparq_family(const char* op, int64_t bits, int64_t stride) {
  check(bits >= 2 && bits <= 4, op, "bits", "2, 3 or 4", bits);
  check(is_sparq_family(bits, stride), op, "stride", "1, or with 4 bits 1, 2 or 4", stride);
}

}  // namespace qk
