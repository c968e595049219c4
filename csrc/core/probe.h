// What a benchmark's figures are held against: products of 8-bit codes on registers alone.
#pragma once
#include <cstdint>

#include "core/kernel.h"

namespace qk {

struct ProbeArgs {
  int64_t rounds;
  int64_t* operations;  // products and sums that were done, two for each pair of codes
};

// On one thread, with the active instruction set. Returns the number of operations.
QK_EXPORT int64_t probe_products(int64_t rounds);

}  // namespace qk

QK_KERNEL(probe, qk::ProbeArgs)
