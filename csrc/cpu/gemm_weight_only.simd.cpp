// Activations in float times weights of few bits. Codes become floats in registers, on their way from memory to the
// sums, so that a single row reads no more than the packed weight; a tile of rows shares what that takes. Sums go along
// K in order, by fused multiply-adds: every instruction set and every number of rows gives the same bits, but for
// bfloat16 of several rows on AMX tiles, which add in their own order and take denormals for 0.
#include "ops/gemm_weight_only.h"

#include "core/scratch.h"
#include "cpu/halves.h"
#include "cpu/lanes.h"
#include "cpu/vectors.h"
#if defined(QK_ISA_AMX)
#include "cpu/amx_halves.h"
#include "cpu/panel.h"
#endif

namespace qk::cpu::QK_ISA {
namespace {

constexpr int lane_vectors = block / lanes;  // of sixteen channels

// A lane's 32 bits are four codes of its channel. Code `byte` of them, as a float; of less than 8 bits it lies in the
// lowest bits of its byte, and what lies above does not matter.
#if defined(QK_ISA_AVX512VNNI)
using Word = __m512i;
constexpr int most_rows = 12;
constexpr int blocks_for(int rows) { return rows <= 4 ? 4 : 2; }
QK_INLINE Word load_word(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int by>
QK_INLINE Word shifted_down(Word w) {
  return _mm512_srli_epi32(w, by);
}
QK_INLINE Lane fused(Lane a, Lane b, Lane sum) { return _mm512_fmadd_ps(a, b, sum); }
template <int B>
struct Values {
  Lane table;  // a permutation reads the lowest 4 bits of an index
  explicit Values(float zero) {
    for (int i = 0; i < lanes; ++i) table[i] = static_cast<float>(i & Bits<B>::mask) - zero;
  }
  template <int byte>
  QK_INLINE Lane at(Word w) const {
    if constexpr (B == 8)
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * byte), 24));
    else
      return _mm512_permutexvar_ps(_mm512_srli_epi32(w, 8 * byte), table);
  }
};
#elif defined(QK_ISA_AVX2)
using Word = __m256i;
constexpr int most_rows = 4;
constexpr int blocks_for(int rows) { return rows <= 2 ? 2 : 1; }
QK_INLINE Word load_word(const uint8_t* p) { return load32(p); }
template <int by>
QK_INLINE Word shifted_down(Word w) {
  return _mm256_srli_epi32(w, by);
}
QK_INLINE Lane fused(Lane a, Lane b, Lane sum) { return _mm256_fmadd_ps(a, b, sum); }
template <int B>
struct Values {
  Lane zero;
  explicit Values(float of_all) : zero(all_lanes(of_all)) {}
  template <int byte>
  QK_INLINE Lane at(Word w) const {
    if constexpr (B == 8) return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 24 - 8 * byte), 24));
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(w, 8 * byte), _mm256_set1_epi32(Bits<B>::mask));
    return _mm256_cvtepi32_ps(code) - zero;
  }
};
#else
typedef uint32_t Word __attribute__((vector_size(16)));
typedef int32_t SignedWord __attribute__((vector_size(16)));
constexpr int most_rows = 2;
constexpr int blocks_for(int) { return 1; }
QK_INLINE Word load_word(const uint8_t* p) { return load<Word>(p); }
template <int by>
QK_INLINE Word shifted_down(Word w) {
  return w >> by;
}
QK_INLINE Lane fused(Lane a, Lane b, Lane sum) {
  for (int i = 0; i < lanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return sum;
}
template <int B>
struct Values {
  Lane zero;
  explicit Values(float of_all) : zero(all_lanes(of_all)) {}
  template <int byte>
  QK_INLINE Lane at(Word w) const {
    const SignedWord code = B == 8 ? reinterpret_cast<SignedWord>(w << (24 - 8 * byte)) >> 24
                                   : reinterpret_cast<SignedWord>(w >> 8 * byte & Bits<B>::mask);
    return __builtin_convertvector(code, Lane) - zero;
  }
};
#endif

// A column of blocks of channels and a tile of rows.
struct FloatTile {
  const uint8_t* weight[4];   // of each block
  const float* zeros;         // [k_groups][blocks * 16]: of code - zero, or less the zero of all
  float zero;                 // of all
  const float* steps;         // [k_groups][blocks * 16]
  const float* bias;          // [blocks * 16]
  int64_t k_groups, vectors;  // vectors of 64 bytes: of a group, in each block
  const float* x;             // [k_padded][rows]
  float* y;                   // [rows][blocks * 16]
};

// own_zeros: channels differ in theirs.
template <int B, int rows, int blocks, bool own_zeros>
void multiply(const FloatTile& t) {
  constexpr int columns = blocks * lane_vectors;
  const Values<B> values(t.zero);
  const float* x = t.x;
  int64_t at = 0;
  for (int64_t g = 0; g < t.k_groups; ++g) {
    Lane sums[rows][columns] = {};
    Lane zeros[columns];
    if constexpr (own_zeros) std::memcpy(zeros, t.zeros + g * blocks * block, sizeof zeros);
    for (const int64_t end = at + t.vectors * PackedLayout::vector; at < end; at += PackedLayout::vector) {
      Word words[columns];
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c)
        words[c] = load_word(t.weight[c / lane_vectors] + at + c % lane_vectors * sizeof(Word));
      for (int part = 0; part < 8 / B; ++part) {
        const auto add = [&](auto byte) {
          Lane w[columns];
#pragma GCC unroll 8
          for (int c = 0; c < columns; ++c) {
            w[c] = values.template at<decltype(byte)::value>(words[c]);
            if constexpr (own_zeros) w[c] = w[c] - zeros[c];
          }
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            const Lane one = all_lanes(x[r]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; ++c) sums[r][c] = fused(w[c], one, sums[r][c]);
          }
          x += rows;
        };
        add(std::integral_constant<int, 0>{});
        add(std::integral_constant<int, 1>{});
        add(std::integral_constant<int, 2>{});
        add(std::integral_constant<int, 3>{});
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) words[c] = shifted_down<B>(words[c]);
      }
    }
    const float* steps = t.steps + g * blocks * block;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        float* const y = t.y + r * blocks * block + c * lanes;
        const Lane step = load<Lane>(steps + c * lanes);
        Lane sum = g ? fused(sums[r][c], step, load<Lane>(y)) : sums[r][c] * step;
        if (t.bias && g + 1 == t.k_groups) sum = sum + load<Lane>(t.bias + c * lanes);
        std::memcpy(y, &sum, sizeof sum);
      }
  }
}

// How work is shared: units are a block of rows times a column of blocks of channels.
struct Share {
  int64_t tile_rows, tile_blocks, block_rows, columns, units, workers;
};

// Tiles that exist, of at least so many rows.
constexpr int64_t rows_of_tile(int64_t rows) {
  constexpr int there[] = {1, 2, 4, 8, 12};
  for (int some : there)
    if (some >= rows && some <= most_rows) return some;
  return most_rows;
}

// bytes: of a value of x as a tile reads it.
Share share_of(const GemmWeightOnlyArgs& a, int64_t tile_rows, int64_t tile_blocks, int64_t bytes) {
  constexpr int64_t rows_budget = 768 * 1024;  // of a block of rows in the L2 cache, beside a column of weights
  constexpr double work_per_thread = 1 << 19;  // products
  const int64_t threads = thread_count(), tiles = ceil_div(a.m, tile_rows);
  const double useful = static_cast<double>(a.m) * a.shape.n * a.shape.k() / work_per_thread;
  Share s{};
  s.tile_rows = tile_rows, s.tile_blocks = tile_blocks;
  s.columns = ceil_div(a.layout.blocks(), tile_blocks);
  const int64_t fit = most<int64_t>(1, rows_budget / (bytes * a.layout.k_padded * tile_rows));  // tiles
  s.workers = useful < static_cast<double>(threads) ? most<int64_t>(1, static_cast<int64_t>(useful)) : threads;
  int64_t row_blocks = ceil_div(tiles, fit);
  if (s.workers > 1) row_blocks = most(row_blocks, least(tiles, ceil_div(4 * s.workers, s.columns)));
  s.block_rows = ceil_div(tiles, row_blocks) * tile_rows;
  s.units = ceil_div(a.m, s.block_rows) * s.columns;
  s.workers = least(s.workers, s.units);
  return s;
}

// What the channels of `blocks` blocks from `from` on have, each [blocks * 16], those with groups [k_groups] of that.
// Those that are not there have anything.
void load_terms(const GemmWeightOnlyArgs& a, int64_t from, int64_t blocks, float* steps, float* bias) {
  const int64_t groups = a.layout.k_groups, width = blocks * block;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = (from + b) * block, valid = least<int64_t>(block, a.shape.n - n);
    if (valid <= 0) break;
    for (int64_t g = 0; g < groups; g += block) {
      Floats some[block];
      load_steps(a.weight_step + n * groups, groups, g, valid, some);
      for (int64_t i = 0; i < block && g + i < groups; ++i)
        std::memcpy(steps + (g + i) * width + b * block, &some[i], sizeof some[i]);
    }
    if (!a.bias) continue;
    const Floats some = load_some<Floats>(a.bias + n, valid);
    std::memcpy(bias + b * block, &some, sizeof some);
  }
}

template <int B>
class Worker {
 public:
  Worker(const GemmWeightOnlyArgs& a, const Share& s, uint8_t* memory)
      : a_(a),
        l_(a.layout),
        s_(s),
        width_(s.tile_blocks * block),
        steps_(reinterpret_cast<float*>(memory)),
        zeros_(steps_ + l_.k_groups * width_),
        bias_(zeros_ + l_.k_groups * width_),
        y_(bias_ + width_),
        x_(y_ + s.tile_rows * width_) {}

  static int64_t bytes(const PackedLayout& l, const Share& s) {
    return 4 * ((2 * l.k_groups + 1 + s.tile_rows) * s.tile_blocks * block + s.block_rows * l.k_padded);
  }
  void finish() {}

  // Tiles of rows, each [k_padded][tile_rows]; what is not there is 0.
  void load_rows(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    const int64_t k = l_.k, tile = s_.tile_rows;
    for (int64_t r = 0; r < round_up(count, tile); ++r) {
      float* to = x_ + r / tile * tile * l_.k_padded + r % tile;
      for (int64_t s = 0; s < l_.segments; ++s, to += l_.segment_padded * tile) {
        const bool there = r < count;
        if (there) widen(a_.type, a_.x, (first + r) * k + s * l_.segment_k, l_.segment_k, to, tile);
        for (int64_t i = there ? l_.segment_k : 0; i < l_.segment_padded; ++i) to[i * tile] = 0;
      }
    }
  }

  void column(int64_t index) {
    FloatTile t{};
    const int64_t from = index * s_.tile_blocks, n_first = from * block;
    const int64_t there = least(s_.tile_blocks, l_.blocks() - from), valid = least(there * block, a_.shape.n - n_first);
    for (int64_t b = 0; b < s_.tile_blocks; ++b)
      t.weight[b] = a_.weight + l_.codes_at + (from + least(b, there - 1)) * l_.block_bytes;
    load_terms(a_, from, s_.tile_blocks, steps_, bias_);
    load_zeros(from, there);
    t.zero = zero_;
    t.zeros = zeros_, t.steps = steps_, t.bias = a_.bias ? bias_ : nullptr;
    t.k_groups = l_.k_groups;
    t.vectors = l_.segment_padded * B / 8 * block / PackedLayout::vector;
    t.y = y_;
    for (int64_t r = 0; r < count_; r += s_.tile_rows) {
      t.x = x_ + r * l_.k_padded;
      own_zeros_ ? by_rows<true>(t) : by_rows<false>(t);
      for (int64_t i = 0, rows = least(s_.tile_rows, count_ - r); i < rows; ++i)
        narrow_all(a_.type, y_ + i * width_, valid, a_.out, (first_ + r + i) * a_.shape.n + n_first);
    }
  }

 private:
  // Zeros as floats, and whether they are all one.
  void load_zeros(int64_t from, int64_t blocks) {
    own_zeros_ = false, zero_ = 0;
    if constexpr (B < 8) {
      const int64_t groups = l_.k_groups;
      const uint8_t* zeros = a_.weight + l_.zeros_at + from * groups * block;
      const uint8_t first = zeros[0];
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t g = 0; g < groups; ++g, zeros += block) {
          bool same = true;
          for (int64_t i = 0, n = a_.shape.n - (from + b) * block; i < least<int64_t>(block, n); ++i)
            same &= zeros[i] == first;
          own_zeros_ |= !same;
          for (int i = 0; i < block; i += lanes) {
            const Lane values = floats_of(zeros + i);
            std::memcpy(zeros_ + g * width_ + b * block + i, &values, sizeof values);
          }
        }
      if (!own_zeros_) zero_ = first;
    }
  }

  template <bool differ>
  void by_rows(const FloatTile& t) {
    constexpr bool own_zeros = differ && B < 8;
    switch (s_.tile_rows) {
      case 1: return multiply<B, 1, blocks_for(1), own_zeros>(t);
      case 2: return multiply<B, 2, blocks_for(2), own_zeros>(t);
#if !defined(QK_ISA_GENERIC)
      case 4: return multiply<B, 4, blocks_for(4), own_zeros>(t);
#endif
#if defined(QK_ISA_AVX512VNNI)
      case 8: return multiply<B, 8, blocks_for(8), own_zeros>(t);
      case 12: return multiply<B, 12, blocks_for(12), own_zeros>(t);
#endif
    }
  }

  const GemmWeightOnlyArgs& a_;
  const PackedLayout& l_;
  const Share& s_;
  const int64_t width_;
  float *const steps_, *const zeros_, *const bias_, *const y_, *const x_;
  int64_t first_ = 0, count_ = 0;
  float zero_ = 0;
  bool own_zeros_ = false;
};

#if defined(QK_ISA_AMX)

constexpr int64_t fewest_for_tiles = 5;  // rows of x; fewer multiply as fast beside what unpacking takes

// On tiles of bfloat16: 32 rows by two blocks of channels. Sums are those of the tiles, in an order of their own.
template <int B>
class TileWorker {
 public:
  TileWorker(const GemmWeightOnlyArgs& a, const Share& s, uint8_t* memory)
      : a_(a),
        l_(a.layout),
        group_tiles_(tiles_of(l_)),
        pitch_(pitch_of(l_)),
        steps_(reinterpret_cast<float*>(memory)),
        bias_(steps_ + l_.k_groups * width),
        sums_(bias_ + width),
        y_(sums_ + width * width),
        weights_(reinterpret_cast<uint8_t*>(y_ + width * width)),
        x_(weights_ + 2 * l_.k_groups * group_tiles_ * tile_bytes) {
    state_.set_rows(side);
  }

  static int64_t bytes(const PackedLayout& l, const Share& s) {
    return 4 * (l.k_groups + 1 + 2 * width) * width + 2 * l.k_groups * tiles_of(l) * tile_bytes +
           s.block_rows * pitch_of(l);
  }
  void finish() { state_.release(); }

  // Groups of K filled up to whole tiles, rows to whole tiles, with 0.
  void load_rows(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    const uint16_t* from = static_cast<const uint16_t*>(a_.x) + first * l_.k;
    const int64_t bytes = 2 * l_.segment_k, padded = 2 * group_tiles_ * halves_k;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t g = 0; g < l_.k_groups; ++g, from += l_.segment_k) {
        uint8_t* to = x_ + r * pitch_ + g * padded;
        std::memcpy(to, from, static_cast<size_t>(bytes));
        std::memset(to + bytes, 0, static_cast<size_t>(padded - bytes));
      }
    const int64_t rest = round_up(count, width) - count;
    std::memset(x_ + count * pitch_, 0, static_cast<size_t>(rest * pitch_));
  }

  void column(int64_t index) {
    const int64_t from = 2 * index, there = least<int64_t>(2, l_.blocks() - from), n_first = from * block;
    const int64_t valid = least(width, a_.shape.n - n_first), block_pitch = l_.k_groups * group_tiles_ * tile_bytes;
    load_terms(a_, from, 2, steps_, bias_);
    for (int64_t b = 0; b < there; ++b) unpack(from + b, weights_ + b * block_pitch);
    if (there < 2) std::memset(weights_ + block_pitch, 0, static_cast<size_t>(block_pitch));
    for (int64_t r = 0; r < count_; r += width) {
      const int64_t rows = least(width, count_ - r);
      for (int64_t g = 0; g < l_.k_groups; ++g) {
        const int64_t at = g * group_tiles_;
        multiply_halves(x_ + r * pitch_ + at * 2 * halves_k, pitch_, weights_ + at * tile_bytes, block_pitch,
                        group_tiles_, sums_);
        add_group(g, rows);
      }
      for (int64_t i = 0; i < rows; ++i)
        narrow_all(a_.type, y_ + i * width, valid, a_.out, (first_ + r + i) * a_.shape.n + n_first);
    }
  }

 private:
  static constexpr int64_t width = 2 * side;
  static int64_t tiles_of(const PackedLayout& l) { return ceil_div(l.segment_padded, halves_k); }  // of a group
  static int64_t pitch_of(const PackedLayout& l) { return row_pitch(2 * l.k_groups * tiles_of(l) * halves_k); }

  void unpack(int64_t index, uint8_t* to) {
    const int64_t codes = l_.segment_padded * block * B / 8, unpacked = l_.segment_padded * block * 2;
    for (int64_t g = 0; g < l_.k_groups; ++g, to += group_tiles_ * tile_bytes) {
      unpack_halves<B>(a_.weight + l_.codes_at + index * l_.block_bytes + g * codes, codes / PackedLayout::vector,
                       a_.weight + l_.zeros_at + (index * l_.k_groups + g) * block, to);
      std::memset(to + unpacked, 0, static_cast<size_t>(group_tiles_ * tile_bytes - unpacked));
    }
  }

  void add_group(int64_t g, int64_t rows) {
    const bool last = a_.bias && g + 1 == l_.k_groups;
    for (int64_t c = 0; c < width; c += lanes) {
      const Lane step = load<Lane>(steps_ + g * width + c), bias = last ? load<Lane>(bias_ + c) : Lane{};
      for (int64_t r = 0; r < rows; ++r) {
        float* const y = y_ + r * width + c;
        const Lane sum = load<Lane>(sums_ + r * width + c);
        Lane value = g ? fused(sum, step, load<Lane>(y)) : sum * step;
        if (last) value = value + bias;
        std::memcpy(y, &value, sizeof value);
      }
    }
  }

  const GemmWeightOnlyArgs& a_;
  const PackedLayout& l_;
  const int64_t group_tiles_, pitch_;
  float *const steps_, *const bias_, *const sums_, *const y_;
  uint8_t *const weights_, *const x_;
  int64_t first_ = 0, count_ = 0;
  TileState state_;
};

#endif

template <class Worker>
void multiply_all(const GemmWeightOnlyArgs& a, const Share& s) {
  parallel_for(s.workers, 1, [&](int64_t begin, int64_t end) {
    Worker worker(a, s, static_cast<uint8_t*>(thread_scratch(Worker::bytes(a.layout, s))));
    int64_t unit = s.units * begin / s.workers, column = unit % s.columns;
    for (const int64_t stop = s.units * end / s.workers; unit < stop; column = 0) {
      const int64_t first = unit / s.columns * s.block_rows;
      worker.load_rows(first, least(s.block_rows, a.m - first));
      for (; column < s.columns && unit < stop; ++column, ++unit) worker.column(column);
    }
    worker.finish();
  });
}

}  // namespace

void gemm_weight_only(const GemmWeightOnlyArgs& a) {
  if (a.m == 0) return;
  with_bits(a.shape.bits, [&](auto bits) {
#if defined(QK_ISA_AMX)
    const bool long_groups = a.layout.k_groups == 1 || a.layout.segment_k >= halves_k;  // shorter ones are filled up
    if (a.type == FloatType::bfloat16 && a.m >= fewest_for_tiles && long_groups)
      return multiply_all<TileWorker<bits>>(a, share_of(a, 2 * side, 2, 2));
#endif
    const int64_t rows = rows_of_tile(ceil_div(a.m, ceil_div(a.m, most_rows)));
    multiply_all<Worker<bits>>(a, share_of(a, rows, blocks_for(static_cast<int>(rows)), 4));
  });
}

}  // namespace qk::cpu::QK_ISA
