// What a benchmark's figures are held against: products of 8-bit codes on registers alone, and reading memory.
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

struct ProbeReadArgs {
  const uint8_t* data;  // on a cache line
  int64_t bytes;        // a multiple of 512
  int64_t rounds;
};

// Bytes a second at which `threads` threads read `bytes` bytes together, over and over: the best of some tries. Each
// reads a part of its own, so what fits into the caches stays there.
QK_EXPORT double probe_bandwidth(int64_t bytes, int64_t threads);

}  // namespace qk

QK_KERNEL(probe, qk::ProbeArgs)
QK_KERNEL(probe_read, qk::ProbeReadArgs)
