#include "ops/prepack.h"

#include <cstring>

#include "cpu/simd.h"

namespace qk::cpu::QK_ISA {
namespace {

// A vector holds four bytes of one channel's row at rest: 32 / B codes of K. They leave as 8 / B steps of four codes:
// code 4 s + t goes to byte t, bit s * B.
template <int B>
uint32_t to_steps(uint32_t x) {
  if constexpr (B == 8) return x ^ 0x80808080u;
  if constexpr (B == 4) {
    const auto to_bytes = [](uint32_t four) {
      four = (four | four << 8) & 0x00ff00ffu;
      return (four | four << 4) & 0x0f0f0f0fu;
    };
    return to_bytes(x & 0xffffu) | to_bytes(x >> 16) << 4;
  }
  // 2 bits: a 4 x 4 matrix is transposed; first inside its quarters, then the quarters.
  uint32_t swap = ((x >> 6) ^ x) & 0x00cc00ccu;
  x ^= swap ^ (swap << 6);
  swap = ((x >> 12) ^ x) & 0x0000f0f0u;
  return x ^ swap ^ (swap << 12);
}

// Sum of the 32 / B codes of four bytes: neighbours are added until a byte, or two, holds a sum.
template <int B>
int32_t code_sum(uint32_t x) {
  if constexpr (B == 2) x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  if constexpr (B < 8) x = (x & 0x0f0f0f0fu) + (x >> 4 & 0x0f0f0f0fu);
  x = (x & 0x00ff00ffu) + (x >> 8 & 0x00ff00ffu);
  return static_cast<int32_t>((x & 0xffffu) + (x >> 16));
}

int code_at(const uint8_t* row, int64_t k, int bits) { return (row[k * bits / 8] >> (k * bits % 8)) & top_code(bits); }

template <int B>
void pack_block(const PrepackArgs& a, int64_t at) {
  constexpr int64_t per_vector = 32 / B;
  constexpr uint32_t filling = B == 8 ? 128 : 0;  // a byte of 0 in the end
  const PackedLayout& l = a.layout;
  const int64_t outer = at / l.blocks_per_outer, first = at % l.blocks_per_outer * PackedLayout::block;
  const int64_t valid = least(PackedLayout::block, l.n_per_outer - first), n0 = outer * l.n_per_outer + first;
  uint8_t* codes = a.out + l.codes_at + at * l.block_bytes;
  for (int64_t i = 0; i < PackedLayout::block; ++i) {
    for (int64_t g = 0; g < l.k_groups; ++g) {
      const int32_t zero = i < valid ? a.zero[(n0 + i) * l.k_groups + g] : 0;
      int32_t sum = 0;
      for (int64_t s = g * l.group_segments(); s < (g + 1) * l.group_segments(); ++s) {
        uint8_t* out = codes + s * l.segment_padded * PackedLayout::block * B / 8 + i * PackedLayout::step;
        for (int64_t k = 0; k < l.segment_padded; k += per_vector, out += PackedLayout::vector) {
          const int64_t there = most<int64_t>(0, least(per_vector, l.segment_k - k));
          uint32_t steps = 0;
          if (i < valid && there > 0) {
            const uint8_t* row = a.packed + (n0 + i) * a.row_bytes;
            const int64_t from = s * l.segment_k + k;
            uint32_t rest = 0;
            if (there == per_vector && from * B % 8 == 0) {
              std::memcpy(&rest, row + from * B / 8, 4);
            } else {
              for (int64_t j = 0; j < per_vector; ++j)
                rest |= (j < there ? static_cast<uint32_t>(code_at(row, from + j, B)) : filling) << (j * B);
            }
            steps = to_steps<B>(rest);
            sum += code_sum<B>(rest) - static_cast<int32_t>(there * zero + (per_vector - there) * filling);
          }
          std::memcpy(out, &steps, 4);
        }
      }
      const int64_t entry = (at * l.k_groups + g) * PackedLayout::block + i;
      std::memcpy(a.out + l.sums_at + entry * 4, &sum, 4);
      if (B < 8) a.out[l.zeros_at + entry] = static_cast<uint8_t>(zero);
    }
  }
}

// A depthwise weight of any width, stored in 8 bits.
void pack_depthwise_block(const PrepackArgs& a, int64_t at) {
  const PackedLayout& l = a.layout;
  for (int64_t i = 0; i < PackedLayout::block; ++i) {
    const int64_t n = at * PackedLayout::block + i;
    int32_t sum = 0;
    for (int64_t k = 0; k < l.k_padded; ++k) a.out[l.code_at(at, k, i)] = 0;
    for (int64_t k = 0; k < l.k && n < a.shape.n; ++k) {
      const int value = code_at(a.packed + n * a.row_bytes, k, a.shape.bits) - a.zero[n];
      a.out[l.code_at(at, l.tap_at(k), i)] = static_cast<uint8_t>(value);
      sum += value;
    }
    std::memcpy(a.out + l.sums_at + (at * PackedLayout::block + i) * 4, &sum, 4);
  }
}

}  // namespace

void winograd_prepack(const PrepackArgs& a);

void prepack(const PrepackArgs& a) {
  if (a.shape.algorithm == Algorithm::winograd) return winograd_prepack(a);
  const PackedLayout& l = a.layout;
  const PackedHeader header{packed_magic, a.shape.bits,   a.shape.n,        a.shape.kh,        a.shape.kw,
                            a.shape.c,    a.shape.groups, a.shape.k_groups, a.shape.algorithm, 0};
  std::memcpy(a.out, &header, sizeof header);
  const int64_t used = l.zeros_at + (l.stored_bits < 8 ? l.blocks() * l.k_groups * PackedLayout::block : 0);
  std::memset(a.out + used, 0, static_cast<size_t>(l.bytes - used));
  const int64_t grain = most<int64_t>(1, grain_values / (PackedLayout::block * l.k_padded));
  parallel_for(l.blocks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      if (a.shape.depthwise()) {
        pack_depthwise_block(a, at);
      } else {
        with_bits(a.shape.bits, [&](auto bits) { pack_block<bits>(a, at); });
      }
    }
  });
}

}  // namespace qk::cpu::QK_ISA
