#include "ops/sparq_unpack.h"

#include "core/sparq_block.h"
#include "cuda/launch.cuh"

namespace qk::cuda {
namespace {

// A thread reads one block of 16 values.
template <int bits, int stride, bool pairs>
__global__ void sparq_unpack_kernel(SparqUnpackArgs a) {
  using Block = SparqBlock<bits, stride, pairs>;
  const int64_t row_blocks = a.row_bytes / Block::bytes, blocks = a.rows * row_blocks;
  const int64_t step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < blocks; i += step) {
    const int64_t row = i / row_blocks, col = i % row_blocks * Block::values;
    uint8_t codes[Block::values], packed[Block::bytes];
#pragma unroll
    for (int j = 0; j < Block::bytes; ++j) packed[j] = a.packed[i * Block::bytes + j];
    Block::unpack(packed, codes);
#pragma unroll
    for (int j = 0; j < Block::values; ++j)
      if (col + j < a.cols) a.codes[row * a.cols + col + j] = codes[j];
  }
}

}  // namespace

void sparq_unpack(const SparqUnpackArgs& a) {
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    using Block = decltype(block);
    const int64_t blocks = ceil_div(a.rows * (a.row_bytes / Block::bytes), block_threads);
    launch("sparq_unpack", sparq_unpack_kernel<Block::bits, Block::stride, Block::pairs>, blocks, a);
  });
}

}  // namespace qk::cuda
