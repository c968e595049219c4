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
    uint8_t packed[Block::bytes];
    typename Block::Half halves[2];
#pragma unroll
    for (int j = 0; j < Block::bytes; ++j) packed[j] = a.packed[i * Block::bytes + j];
    Block::load(packed, halves);
    const uint64_t words[2] = {Block::unpack(halves[0]), Block::unpack(halves[1])};
#pragma unroll
    for (int j = 0; j < Block::values; ++j)
      if (col + j < a.cols) a.codes[row * a.cols + col + j] = static_cast<uint8_t>(words[j / 8] >> j % 8 * 8);
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
