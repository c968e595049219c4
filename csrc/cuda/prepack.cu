#include "ops/prepack.h"

#include "cuda/launch.cuh"

namespace qk::cuda {
namespace {

// The output channel of place i in a block, or -1.
__device__ int64_t channel_of(const PackedLayout& layout, int64_t block, int64_t i) {
  const int64_t in_outer = block % layout.blocks_per_outer * PackedLayout::block + i;
  return in_outer < layout.n_per_outer ? block / layout.blocks_per_outer * layout.n_per_outer + in_outer : -1;
}

__device__ int code_at_rest(const PrepackArgs& a, int64_t n, int64_t k) {
  const int bits = a.shape.bits, per_byte = 8 / bits;
  return a.packed[n * a.row_bytes + k / per_byte] >> (k % per_byte * bits) & top_code(bits);
}

struct Place {
  int64_t channel, k;  // of a block, padded
};

// What part `part` of a byte of a block's codes holds.
__device__ Place place_of(const PrepackArgs& a, int64_t byte, int part) {
  const int bits = a.layout.stored_bits;
  if (a.shape.depthwise()) {
    const int64_t in_vector = byte % PackedLayout::vector;
    return {in_vector / PackedLayout::step,
            byte / PackedLayout::vector * PackedLayout::step + in_vector % PackedLayout::step};
  }
  const int64_t tile = byte / tile_bytes(bits);
  const TilePlace found = tile_place(bits, static_cast<int>(byte % tile_bytes(bits)), part);
  return {found.channel, tile * tile_k + found.k};
}

// A thread makes one byte of codes.
__global__ void codes_kernel(PrepackArgs a) {
  const PackedLayout& layout = a.layout;
  const int per_byte = 8 / layout.stored_bits;
  const int64_t all = layout.sums_at - layout.codes_at, step = int64_t{gridDim.x} * block_threads;
  for (int64_t at = int64_t{blockIdx.x} * block_threads + threadIdx.x; at < all; at += step) {
    int byte = 0;
    for (int j = 0; j < per_byte; ++j) {
      const Place place = place_of(a, at % layout.block_bytes, j);
      const int64_t n = channel_of(layout, at / layout.block_bytes, place.channel);
      const int64_t segment = place.k / layout.segment_padded, in_segment = place.k % layout.segment_padded;
      if (n < 0 || in_segment >= layout.segment_k) continue;
      // The segments of a depthwise weight are columns of the kernel.
      const bool columns = a.shape.depthwise();
      const int zero = a.zero[n * layout.k_groups + (columns ? 0 : segment)];
      const int code = code_at_rest(
          a, n, columns ? in_segment * layout.segments + segment : segment * layout.segment_k + in_segment);
      byte |= layout.stored_bits == 8 ? code - zero : code << (j * layout.stored_bits);
    }
    a.out[layout.codes_at + at] = static_cast<uint8_t>(byte);
  }
}

// A thread makes the sum and the zero of one channel and group; the first ones also the header and the last bytes.
__global__ void sums_kernel(PrepackArgs a, PackedHeader header) {
  const PackedLayout& layout = a.layout;
  const int64_t first = int64_t{blockIdx.x} * block_threads + threadIdx.x, step = int64_t{gridDim.x} * block_threads;
  const int64_t all = layout.blocks() * layout.k_groups * PackedLayout::block;
  const int64_t end = layout.zeros_at + (layout.stored_bits < 8 ? all : 0);
  if (first == 0) *reinterpret_cast<PackedHeader*>(a.out) = header;
  if (end + first < layout.bytes) a.out[end + first] = 0;  // fewer than 64
  for (int64_t at = first; at < all; at += step) {
    const int64_t group = at / PackedLayout::block % layout.k_groups;
    const int64_t n = channel_of(layout, at / (PackedLayout::block * layout.k_groups), at % PackedLayout::block);
    const int zero = n < 0 ? 0 : a.zero[n * layout.k_groups + group];
    int sum = 0;
    const int64_t group_k = layout.k / layout.k_groups;
    for (int64_t k = 0; k < group_k && n >= 0; ++k) sum += code_at_rest(a, n, group * group_k + k) - zero;
    reinterpret_cast<int32_t*>(a.out + layout.sums_at)[at] = sum;
    if (layout.stored_bits < 8) a.out[layout.zeros_at + at] = static_cast<uint8_t>(zero);
  }
}

}  // namespace

void prepack(const PrepackArgs& a) {
  const PackedLayout& layout = a.layout;
  const WeightShape& s = a.shape;
  const PackedHeader header{packed_magic, s.bits, s.n, s.kh, s.kw, s.c, s.groups, s.k_groups, s.algorithm, 0};
  launch("prepack", codes_kernel, ceil_div(layout.sums_at - layout.codes_at, block_threads), a);
  launch("prepack", sums_kernel, ceil_div(layout.blocks() * layout.k_groups * PackedLayout::block, block_threads), a,
         header);
}

}  // namespace qk::cuda
