// Sums over a tensor are made of chunks of fixed size that are added up in order, so threads never change a bit.
#pragma once
#include <cstdint>

namespace qk {

constexpr int64_t sum_chunk = 8192;  // values of one partial sum: 32 KB of each input, so two inputs fit in L2
constexpr int64_t sum_chunks(int64_t values) { return (values + sum_chunk - 1) / sum_chunk; }

}  // namespace qk
