#include "ops/pack.h"

#include "cpu/chunks.h"

namespace qk::cpu::QK_ISA {
namespace {

// Whole bytes of a row; returns the OR of the codes.
template <int B>
uint8_t pack_bytes(const uint8_t* __restrict codes, uint8_t* __restrict packed, int64_t bytes) {
  constexpr int n = Bits<B>::per_byte;
  uint8_t used = 0;
  for (int64_t i = 0; i < bytes; ++i) {
    uint8_t byte = 0;
    for (int j = 0; j < n; ++j) {
      byte |= static_cast<uint8_t>(codes[i * n + j] << (j * B));
      used |= codes[i * n + j];
    }
    packed[i] = byte;
  }
  return used;
}

template <int B>
void pack_row(const PackArgs& a, int64_t row) {
  constexpr int n = Bits<B>::per_byte;
  const uint8_t* codes = a.codes + row * a.cols;
  uint8_t* packed = a.packed + row * a.row_bytes;
  const int64_t whole = a.cols / n, rest = a.cols % n;
  uint8_t used = pack_bytes<B>(codes, packed, whole);
  for (int64_t i = whole; i < a.row_bytes; ++i) packed[i] = 0;
  if (rest) {
    uint8_t last[n] = {};
    for (int64_t j = 0; j < rest; ++j) last[j] = codes[whole * n + j];
    used |= pack_bytes<B>(last, packed + whole, 1);
  }
  a.used[row] = used;
}

}  // namespace

void pack(const PackArgs& a) {
  with_bits(a.bits, [&](auto bits) { each_row(a.rows, a.cols, [&](int64_t row) { pack_row<bits>(a, row); }); });
}

}  // namespace qk::cpu::QK_ISA
