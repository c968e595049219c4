#include "ops/sparq_pack.h"

#include "core/sparq_block.h"
#include "cuda/launch.cuh"

namespace qk::cuda {
namespace {

// A thread makes one block of 16 values; blocks are of odd lengths, so bytes are what it reads and writes.
template <int bits, int stride, bool pairs>
__global__ void sparq_pack_kernel(SparqPackArgs a) {
  using Block = SparqBlock<bits, stride, pairs>;
  const int64_t row_blocks = a.row_bytes / Block::bytes, blocks = a.rows * row_blocks;
  const int64_t step = int64_t{gridDim.x} * block_threads;
  for (int64_t i = int64_t{blockIdx.x} * block_threads + threadIdx.x; i < blocks; i += step) {
    const int64_t row = i / row_blocks, col = i % row_blocks * Block::values;
    uint64_t words[2] = {};
    uint8_t packed[Block::bytes];
#pragma unroll
    for (int j = 0; j < Block::values; ++j)
      if (col + j < a.cols) words[j / 8] |= uint64_t{a.codes[row * a.cols + col + j]} << j % 8 * 8;
    const typename Block::Half halves[2] = {Block::pack(words[0]), Block::pack(words[1])};
    Block::store(halves, packed);
#pragma unroll
    for (int j = 0; j < Block::bytes; ++j) a.packed[i * Block::bytes + j] = packed[j];
#if defined(QK_EMULATED)  // there the face reads it, since the tensors are the CPU's
    a.lost[row] |= (halves[0].lost | halves[1].lost) != 0;
#endif
  }
}

}  // namespace

void sparq_pack(const SparqPackArgs& a) {
#if defined(QK_EMULATED)
  for (int64_t i = 0; i < a.rows; ++i) a.lost[i] = 0;
#endif
  with_sparq_block(a.bits, a.stride, a.pairs, [&](auto block) {
    using Block = decltype(block);
    const int64_t blocks = ceil_div(a.rows * (a.row_bytes / Block::bytes), block_threads);
    launch("sparq_pack", sparq_pack_kernel<Block::bits, Block::stride, Block::pairs>, blocks, a);
  });
}

}  // namespace qk::cuda
