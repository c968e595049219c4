// Packing maths: where the codes of a weight lie in the order of the kernels. Arithmetic only, so that host, device and
// tests agree. Nothing here touches memory.
#pragma once
#include <cstdint>

#include "core/bits.h"

namespace qk {

QK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
QK_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Every size is below 2^31, so a product of two fits int64; a weight and a result have at most 2^47 values, which
// leaves room for what a layout adds and for the bytes of a value.
constexpr int64_t size_limit = int64_t{1} << 31, values_limit = int64_t{1} << 47;

// What a prepacked weight is made for.
enum class Algorithm : int32_t { direct, winograd };

// A weight [n, kh, kw, c], c input channels of each of `groups`; a Linear is [n, 1, 1, K].
struct WeightShape {
  int64_t n, kh, kw, c;
  int64_t groups;    // of the convolution
  int64_t k_groups;  // of K, with a step and a zero each
  int bits;          // 2, 4 or 8
  Algorithm algorithm = Algorithm::direct;

  QK_HD constexpr int64_t taps() const { return kh * kw; }
  QK_HD constexpr int64_t k() const { return kh * kw * c; }
  QK_HD constexpr int64_t group_k() const { return k() / k_groups; }
  // One input channel makes one output channel.
  QK_HD constexpr bool depthwise() const { return groups > 1 && c == 1 && n == groups && k_groups == 1; }
};

// The largest |code - zero| of a weight. 8-bit weights have zero 128.
QK_HD constexpr int64_t worst_weight(int bits) { return bits == 8 ? 128 : top_code(bits); }

// The longest K whose sum of (u_x - z_x) (u_w - z_w) stays in int32 whatever the codes are.
QK_HD constexpr int64_t longest_k(int64_t x_bits, int bits) {
  return INT32_MAX / (top_code(x_bits) * worst_weight(bits));
}

// First 64 bytes of a prepacked weight: what it was made from, so that another use is refused.
struct PackedHeader {
  int32_t magic, bits;
  int64_t n, kh, kw, c, groups, k_groups;
  Algorithm algorithm;
  int32_t pairs_fit;  // for Winograd: weights_fit_pairs holds for every two neighbouring input channels
};
static_assert(sizeof(PackedHeader) == 64, "the codes behind it start on a cache line");
// Two products of codes of 8 bits with neighbouring weights of these sizes fit 16 bits with their sign.
QK_HD constexpr bool weights_fit_pairs(int64_t a, int64_t b) { return 255 * (a + b) < 1 << 15; }
constexpr int32_t packed_magic = 0x32304b51;  // "QK02": change it with the layout

// Blocks of 16 output channels; a convolution's groups start a new block. Inside a block K goes in steps of 4:
// 16 channels x 4 codes. A vector of 64 bytes holds 8 / bits steps, step j of channel i at byte 4 i + k % 4,
// bit j * bits. 8-bit codes are stored as u - 128 (int8).
// K is a list of segments of equal length: the rows of the kernel (kw * c), or the groups of K if there are several.
// A segment is filled up with bytes of 0 to segment_padded codes: the rows of a kernel to a multiple of 64, so that 16
// steps of int8 are one AMX tile (64 codes of 16 channels), groups to whole vectors. A byte of 0 is the value 0 in 8
// bits and the code 0 below: a kernel that subtracts zeros must do so on segment_k codes only.
// A depthwise weight is stored in 8 bits as u - zero (int8), and its segments are the columns of the kernel, kh codes
// in whole steps: one vector has four taps of a column.
//   header | codes [blocks][k_groups][vectors][64] | sums int32 [blocks][k_groups][16] |
//   zeros uint8 [blocks][k_groups][16] | 0 up to whole cache lines
// sums: of u - zero over the group. zeros: only below 8 bits.
// For Winograd's algorithm (docs/winograd.md) a block is [vectors][9 taps][64]: a vector holds 32 / bits input channels
// of one tap, and is filled up with codes of zero. sums: int32 [blocks][16 positions][16] of the transformed weights.
struct PackedLayout {
  static constexpr int64_t block = 16, step = 4, vector = 64, segment_unit = 64;
  int stored_bits;
  int64_t outer;             // groups of the convolution that have blocks of their own
  int64_t n_per_outer;       // output channels of each
  int64_t blocks_per_outer;  // of 16 channels
  int64_t k;                 // length of the sum
  int64_t segments, segment_k, segment_padded;
  int64_t k_padded, k_groups;
  int64_t block_bytes;  // codes of one block
  int64_t codes_at, sums_at, zeros_at, bytes;

  QK_HD constexpr int64_t group_segments() const { return segments / k_groups; }  // of each group of K
  QK_HD constexpr int64_t blocks() const { return outer * blocks_per_outer; }
  // Byte of the vector that holds padded position k of channel i of a block.
  QK_HD constexpr int64_t code_at(int64_t block_index, int64_t k_pos, int64_t i) const {
    const int64_t per = 8 / stored_bits;
    return codes_at + block_index * block_bytes + k_pos / (step * per) * vector + i * step + k_pos % step;
  }
  // The same for input channel c of a tap in Winograd's order, and its first bit.
  QK_HD constexpr int64_t winograd_at(int64_t block_index, int64_t tap, int64_t c, int64_t i) const {
    const int64_t per = step * (8 / stored_bits);
    return codes_at + block_index * block_bytes + (c / per * 9 + tap) * vector + i * step + c % step;
  }
  QK_HD constexpr int64_t winograd_bit(int64_t c) const { return c / step % (8 / stored_bits) * stored_bits; }
  // Padded position of a tap of a depthwise weight.
  QK_HD constexpr int64_t tap_at(int64_t tap) const { return tap % segments * segment_padded + tap / segments; }
};

// What a layout has besides segments, codes_at to bytes included.
QK_HD constexpr PackedLayout with_segments(const WeightShape& w, int64_t segments, int64_t unit) {
  PackedLayout p{};
  const bool depthwise = w.depthwise(), winograd = w.algorithm == Algorithm::winograd;
  p.stored_bits = depthwise ? 8 : w.bits;
  p.outer = depthwise ? 1 : w.groups;
  p.n_per_outer = w.n / p.outer;
  p.blocks_per_outer = ceil_div(p.n_per_outer, PackedLayout::block);
  p.k = w.k();
  p.k_groups = w.k_groups;
  p.segments = segments;
  p.segment_k = p.k / p.segments;
  p.segment_padded = round_up(p.segment_k, unit);
  p.k_padded = p.segment_padded * p.segments;
  p.block_bytes = p.k_padded * PackedLayout::block * p.stored_bits / 8;
  p.codes_at = sizeof(PackedHeader);
  p.sums_at = p.codes_at + p.blocks() * p.block_bytes;
  p.zeros_at = p.sums_at + p.blocks() * (winograd ? 16 : p.k_groups) * PackedLayout::block * 4;
  p.bytes = round_up(p.zeros_at + (p.stored_bits < 8 ? p.blocks() * p.k_groups * PackedLayout::block : 0), 64);
  return p;
}

namespace cpu {

QK_HD constexpr PackedLayout packed_layout(const WeightShape& w) {
  const bool depthwise = w.depthwise(), winograd = w.algorithm == Algorithm::winograd;
  const int64_t whole_vectors = PackedLayout::step * (8 / (depthwise ? 8 : w.bits));
  return with_segments(w,
                       depthwise         ? w.kw
                       : winograd        ? w.taps()
                       : w.k_groups == 1 ? w.kh
                                         : w.k_groups,
                       depthwise || winograd || w.k_groups > 1 ? whole_vectors : int64_t{PackedLayout::segment_unit});
}

}  // namespace cpu

// A depthwise weight on CUDA lies as on the CPU. Of any other the segments are the groups of K, filled up to whole
// tiles of 16 channels x 64 codes: two steps of the matrix instruction m16n8k32, whose first factor they are. In a
// step, lane 4 g + t has in byte b of register i the code of channel g + 8 (i & 1) at 16 (i >> 1) + 4 t + b of K. 8-bit
// codes: the four registers of a lane, then the next lane, then the next step. 4 bits: word 2 s + p of a lane has
// register 2 p of step s in the low halves of its bytes and 2 p + 1 in the high ones. 2 bits: word s has register i in
// bits 2 i.
namespace cuda {

constexpr int tile_k = 64, step_k = 32;

QK_HD constexpr PackedLayout packed_layout(const WeightShape& w) {
  if (w.depthwise() || w.algorithm == Algorithm::winograd) return cpu::packed_layout(w);
  return with_segments(w, w.k_groups, tile_k);
}

QK_HD constexpr int tile_bytes(int bits) { return PackedLayout::block * tile_k * bits / 8; }

struct TilePlace {
  int channel, k;
};

// What part `part` (of 8 / bits) of a byte of a tile is the code of.
QK_HD constexpr TilePlace tile_place(int bits, int byte, int part) {
  const int words = bits == 8 ? 4 : bits;  // of a lane, in a row of memory
  const int lane = byte / (4 * words) % 32, word = byte / 4 % words, b = byte % 4;
  const int step = bits == 8 ? byte / 512 : bits == 4 ? word / 2 : word;
  const int i = bits == 8 ? word : bits == 4 ? 2 * (word % 2) + part : part;
  return {lane / 4 + 8 * (i & 1), step * step_k + 16 * (i >> 1) + 4 * (lane % 4) + b};
}

// Where a tile has a code: the inverse of tile_place.
struct TileBits {
  int byte, shift;
};

QK_HD constexpr TileBits bits_of_tile(int bits, int channel, int k) {
  const int lane = 4 * (channel % 8) + k / 4 % 4, step = k / step_k, half = k % step_k / 16, i = channel / 8 + 2 * half;
  if (bits == 8) return {step * 512 + lane * 16 + i * 4 + k % 4, 0};
  if (bits == 4) return {lane * 16 + (2 * step + half) * 4 + k % 4, 4 * (i % 2)};
  return {lane * 8 + step * 4 + k % 4, 2 * i};
}
static_assert([] {
  for (int bits = 2; bits <= 8; bits *= 2)
    for (int byte = 0; byte < tile_bytes(bits); ++byte)
      for (int part = 0; part < 8 / bits; ++part) {
        const TilePlace place = tile_place(bits, byte, part);
        const TileBits at = bits_of_tile(bits, place.channel, place.k);
        if (at.byte != byte || at.shift != part * bits) return false;
      }
  return true;
}());

}  // namespace cuda

}  // namespace qk
