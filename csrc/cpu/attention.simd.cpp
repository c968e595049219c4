// Attention of one head and some of its queries at a time: its keys and values are put into the order of dot.h once,
// then a few queries' scores, weights and results stay in L1.
#include "ops/attention.h"

#include "core/layout.h"
#include "core/scratch.h"
#include "cpu/attention_products.h"
#include "cpu/finish.h"
#include "cpu/lanes.h"

namespace qk::cpu::QK_ISA {
namespace {

typedef uint16_t Pairs8 __attribute__((vector_size(16)));
typedef int32_t LaneInts __attribute__((vector_size(4 * lanes)));
typedef uint32_t LaneWords __attribute__((vector_size(4 * lanes)));

constexpr uint8_t middle = 128;        // codes - 128 are int8
constexpr int32_t unseen = INT32_MIN;  // the score of a key that a query does not see

// The lowest byte of each, as products read it; the largest; the sum, which may wrap.
#if defined(QK_ISA_AVX512VNNI)
QK_INLINE void store_weights(LaneInts v, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}
QK_INLINE int32_t largest_of(LaneInts v) { return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v)); }
QK_INLINE uint32_t sum_of(LaneInts v) {
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v)));
}
#else
QK_INLINE void store_weights(LaneInts v, uint8_t* to) {
#if defined(QK_ISA_AVX2)
  const __m256i bytes = _mm256_and_si256(reinterpret_cast<__m256i>(v), _mm256_set1_epi32(255));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
#else
  for (int i = 0; i < lanes; ++i) to[i] = static_cast<uint8_t>(v[i]);
#endif
}
QK_INLINE int32_t largest_of(LaneInts v) {
  int32_t top = v[0];
  for (int i = 1; i < lanes; ++i) top = most(top, v[i]);
  return top;
}
QK_INLINE uint32_t sum_of(LaneInts v) {
  uint32_t sum = 0;
  for (int i = 0; i < lanes; ++i) sum += static_cast<uint32_t>(v[i]);
  return sum;
}
#endif

// What is packed, in steps of 4 and blocks of 16; on tiles in whole ones of 16 steps.
struct Counts {
  static constexpr int64_t unit = tiles ? 16 : 1;
  int64_t depth_steps, key_blocks, key_steps, width_blocks;
  explicit Counts(const AttentionArgs& a)
      : depth_steps(round_up(ceil_div(a.depth, 4), unit)),
        key_blocks(ceil_div(a.keys, block)),
        key_steps(round_up(4 * key_blocks, unit)),
        width_blocks(ceil_div(a.width, block)) {}
};

// One worker's memory.
struct Room {
  uint8_t* keys;     // [key_blocks][depth_steps][16 keys x 4 of depth], int8
  int32_t* start;    // [key_blocks * 16]: -q_zero * (sum of a key)
  uint8_t* values;   // [width_blocks][key_steps][16 of width x 4 keys], int8
  uint8_t* query;    // [rows_at_once][4 * depth_steps], where rows are not whole steps or tiles
  int32_t* scores;   // [rows_at_once][key_blocks * 16]
  uint8_t* weights;  // [rows_at_once][4 * key_steps]
  int32_t* sums;     // [rows_at_once][width_blocks * 16]
};

template <bool codes>
class Worker {
 public:
  Worker(const AttentionArgs& a, const Counts& counts, const Room& room, TileState& state)
      : a_(a),
        room_(room),
        state_(state),
        counts_(counts),
        halvings_(*a.q.step * *a.k.step * a.exponent),
        finish_(epilogue(a.out)) {}

  void load_head(int64_t batch, int64_t head) {
    batch_ = batch, head_ = head;
    pack_keys();
    pack_values();
  }

  void queries(int64_t begin, int64_t end) {
    for (; begin < end; begin += rows_at_once) some_queries(begin, least<int64_t>(rows_at_once, end - begin));
  }

 private:
  static Epilogue epilogue(const Result& r) {
    Epilogue e{};
    e.activation = r.activation;
    e.out_step = r.step, e.out_zero = r.zero, e.out_bits = r.bits;
    return e;
  }
  const uint8_t* row(const Operand& o, int64_t rows, int64_t r, int64_t columns) const {
    return static_cast<const uint8_t*>(o.data) + ((batch_ * rows + r) * a_.heads + head_) * columns;
  }

  const uint8_t* mask_row(int64_t query) const {
    const int64_t batch = a_.mask_batch == 1 ? 0 : batch_, row = a_.mask_rows == 1 ? 0 : query;
    const uint8_t* const mask = a_.mask + (batch * a_.mask_rows + row) * a_.keys;
    return std::memchr(mask, 0, static_cast<size_t>(a_.keys)) ? mask : nullptr;
  }

  void pack_keys() {
    for (int64_t i = 0; i < 4 * counts_.depth_steps * wide; ++i) room_.query[i] = i % wide == 0;  // a query of ones
    for (int64_t b = 0; b < counts_.key_blocks; ++b) {
      const int64_t there = least<int64_t>(block, a_.keys - b * block);
      const uint8_t* const from = row(a_.k, a_.keys, b * block, a_.depth);
      const int64_t stride = a_.heads * a_.depth;
      const int64_t filled = ceil_div(a_.depth, 4);
      uint8_t* const to = room_.keys + b * counts_.depth_steps * step_bytes;
      std::memset(to + filled * step_bytes, 0, static_cast<size_t>((counts_.depth_steps - filled) * step_bytes));
      for (int64_t s = 0; s < filled; ++s) {
        const int64_t n = least<int64_t>(4, a_.depth - 4 * s);
        uint8_t bytes[64] = {};
        for (int64_t j = 0; j < there; ++j) {
          const uint8_t* const at = from + j * stride + 4 * s;
          if (n == 4) {
            const uint32_t four = load4(at) ^ 0x80808080u;
            std::memcpy(bytes + 4 * j, &four, 4);
          } else {
            for (int64_t i = 0; i < n; ++i) bytes[4 * j + i] = at[i] ^ middle;
          }
        }
        put_step(bytes, to + s * step_bytes);
      }
      int32_t* const sums = room_.start + b * block;
      small_product<1, 1>(room_.query, 0, to, 0, counts_.depth_steps, nullptr, sums, 0);
      for (int64_t j = 0; j < block; ++j) sums[j] *= -*a_.q.zero;
    }
  }

  void pack_values() {
    for (int64_t b = 0; b < counts_.width_blocks; ++b) {
      const int64_t valid = least<int64_t>(block, a_.width - b * block);
      for (int64_t s = 0; s < counts_.key_steps; ++s) {
        Codes four[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          four[i] = 4 * s + i < a_.keys
                        ? load_some<Codes>(row(a_.v, a_.keys, 4 * s + i, a_.width) + b * block, valid) ^ middle
                        : Codes{};
        uint8_t bytes[64];
        interleave(four, bytes);
        put_step(bytes, room_.values + (b * counts_.key_steps + s) * step_bytes);
      }
    }
  }

  // Byte i of vector j to byte 4 i + j.
  static QK_INLINE void interleave(const Codes (&v)[4], uint8_t* to) {
    const auto low = [](auto a, auto b) {
      return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    };
    const auto high = [](auto a, auto b) {
      return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    };
    const Codes first[2] = {low(v[0], v[1]), high(v[0], v[1])}, second[2] = {low(v[2], v[3]), high(v[2], v[3])};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Pairs8 a = reinterpret_cast<Pairs8>(first[i]), b = reinterpret_cast<Pairs8>(second[i]);
      const Pairs8 both[2] = {__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
                              __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
      std::memcpy(to + 32 * i, both, 32);
    }
  }

  // As products read them: where they lie if they consist of whole steps of bytes, or tiles.
  const uint8_t* query_rows(const uint8_t* x, int64_t rows, int64_t& stride) {
    if (wide == 1 && a_.depth % (tiles ? 64 : 4) == 0) return x;
    const int64_t reach = 4 * counts_.depth_steps * wide;
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* const to = room_.query + r * reach;
      if constexpr (wide == 1)
        std::memcpy(to, x + r * stride, static_cast<size_t>(a_.depth));
      else
        for (int64_t i = 0; i < a_.depth; ++i) to[2 * i] = x[r * stride + i], to[2 * i + 1] = 0;
    }
    stride = reach;
    return room_.query;
  }

  void some_queries(int64_t first, int64_t rows) {
    const int64_t keys = counts_.key_blocks * block, width = counts_.width_blocks * block,
                  reach = 4 * counts_.key_steps * wide;
    int64_t stride = a_.heads * a_.depth;
    const uint8_t* const x = query_rows(row(a_.q, a_.queries, first, a_.depth), rows, stride);
    all_products(state_, rows, x, stride, room_.keys, counts_.depth_steps * step_bytes, counts_.depth_steps,
                 counts_.key_blocks, room_.start, room_.scores, keys);
    uint32_t totals[rows_at_once];
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* const weights = room_.weights + r * reach;
      totals[r] = weigh(room_.scores + r * keys, first + r, weights);
      std::memset(weights + keys * wide, 0, static_cast<size_t>(reach - keys * wide));
    }
    all_products(state_, rows, room_.weights, reach, room_.values, counts_.key_steps * step_bytes, counts_.key_steps,
                 counts_.width_blocks, nullptr, room_.sums, width);
    const uint32_t shift = static_cast<uint32_t>(middle - *a_.v.zero);
    for (int64_t r = 0; r < rows; ++r) {
      const float ratio = totals[r] > 0 ? *a_.v.step / static_cast<float>(totals[r]) : 0.0f;
      const int64_t at = ((batch_ * a_.queries + first + r) * a_.heads + head_) * a_.width;
      for (int64_t b = 0; b < counts_.width_blocks; ++b) {
        const Words sums = load<Words>(room_.sums + r * width + b * block) + shift * totals[r];
        const Floats y = __builtin_convertvector(reinterpret_cast<Ints>(sums), Floats) * ratio;
        finish_.write(y, a_.out.data, at + b * block, least<int64_t>(block, a_.width - b * block));
      }
    }
  }

  // Scores of a query, whole blocks -> weights, 0 for keys that it does not see; their sum.
  uint32_t weigh(int32_t* scores, int64_t query, uint8_t* weights) const {
    const uint8_t* const mask = a_.mask ? mask_row(query) : nullptr;
    if (mask)
      for (int64_t j = 0; j < a_.keys; ++j) scores[j] = mask[j] ? scores[j] : unseen;
    const int64_t n = counts_.key_blocks * block;
    for (int64_t j = a_.keys; j < n; ++j) scores[j] = unseen;
    LaneInts largest = load<LaneInts>(scores);
    for (int64_t i = 0; i < n; i += lanes) {
      const LaneInts s = load<LaneInts>(scores + i);
      largest = s > largest ? s : largest;
    }
    const int32_t top = largest_of(largest);
    if (top == unseen) {
      std::memset(weights, 0, static_cast<size_t>(n * wide));
      return 0;
    }
    return mask || n > a_.keys ? weigh<true>(scores, n, top, weights) : weigh<false>(scores, n, top, weights);
  }

  template <bool some_unseen>
  QK_INLINE uint32_t weigh(const int32_t* scores, int64_t n, int32_t top, uint8_t* weights) const {
    const Lane halvings = all_lanes(halvings_), limit = all_lanes(farthest), magic = all_lanes(0x1.8p23f);
    const LaneInts nothing = reinterpret_cast<LaneInts>(magic);
    LaneWords total = reinterpret_cast<LaneWords>(nothing) * static_cast<uint32_t>(-(n / lanes));
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i += lanes) {
      const LaneInts s = load<LaneInts>(scores + i);
      const LaneInts away = reinterpret_cast<LaneInts>(static_cast<uint32_t>(top) - reinterpret_cast<LaneWords>(s));
      const Lane t = lower(__builtin_convertvector(away, Lane) * halvings, limit);
      // What is added to 1.5 * 2^23 is rounded to an integer in the lowest bits.
      const Lane shifted = t + magic, f = (shifted - magic) - t;
      const Lane power = ((power_3 * f + power_2) * f + power_1) * f + power_0;
      const Lane halved =
          reinterpret_cast<Lane>(reinterpret_cast<LaneWords>(power) - (reinterpret_cast<LaneWords>(shifted) << 23));
      LaneInts bits = reinterpret_cast<LaneInts>(halved + magic);
      if constexpr (some_unseen) bits = s != unseen ? bits : nothing;
      store_weights(bits, weights + i * wide);
      total += reinterpret_cast<LaneWords>(bits);
    }
    return sum_of(reinterpret_cast<LaneInts>(total));
  }

  const AttentionArgs& a_;
  const Room room_;
  TileState& state_;
  const Counts counts_;
  const float halvings_;
  const Finish<codes, Residual::none> finish_;
  int64_t batch_ = 0, head_ = 0;
};

template <bool codes>
void run(const AttentionArgs& a) {
  const Counts c(a);
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += round_up(size, 64);
    return at;
  };
  const int64_t keys = take(c.key_blocks * c.depth_steps * step_bytes), start = take(c.key_blocks * block * 4);
  const int64_t values = take(c.width_blocks * c.key_steps * step_bytes);
  const int64_t query = take(rows_at_once * c.depth_steps * 4 * wide);
  const int64_t scores = take(rows_at_once * c.key_blocks * block * 4);
  const int64_t weights = take(rows_at_once * c.key_steps * 4 * wide);
  const int64_t sums = take(rows_at_once * c.width_blocks * block * 4);
  // Where heads are few, several threads share one, each with its own copy of its keys.
  const int64_t heads = a.batch * a.heads, threads = thread_count();
  const int64_t shares =
      least(ceil_div(a.queries, 4 * rows_at_once), heads < 4 * threads ? ceil_div(4 * threads, heads) : 1);
  const int64_t work = a.queries * a.keys * (a.depth + a.width) / shares;
  parallel_for(heads * shares, most<int64_t>(1, (1 << 18) / most<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    uint8_t* const memory = static_cast<uint8_t*>(thread_scratch(bytes));
    TileState state;
    Worker<codes> worker(
        a, c,
        {memory + keys, reinterpret_cast<int32_t*>(memory + start), memory + values, memory + query,
         reinterpret_cast<int32_t*>(memory + scores), memory + weights, reinterpret_cast<int32_t*>(memory + sums)},
        state);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / shares, share = unit % shares;
      if (unit == begin || share == 0) worker.load_head(head / a.heads, head % a.heads);
      worker.queries(a.queries * share / shares, a.queries * (share + 1) / shares);
    }
#if defined(QK_ISA_AMX)
    state.release();
#endif
  });
}

}  // namespace

void attention(const AttentionArgs& a) { a.out.step ? run<true>(a) : run<false>(a); }

}  // namespace qk::cpu::QK_ISA
