// Convolutions by Winograd's F(2 x 2, 3 x 3), exact in integers: docs/winograd.md.
#include "cpu/winograd.h"

#include "core/scratch.h"
#include "ops/conv2d.h"
#include "ops/prepack.h"

namespace qk::cpu::QK_ISA {
namespace winograd_parts {
namespace {

// Rows of a group of tiles, blocks of a column; how much of V and of M stays in L2 beside a column of weights: 2 MB
// where there are AMX tiles, else 1 MB and more.
#if defined(QK_ISA_AMX)
constexpr int64_t most_rows = 16, column_blocks = 2, v_budget = 768 * 1024, m_budget = 280 * 1024;
#elif defined(QK_ISA_AVX512VNNI)
constexpr int64_t most_rows = 14, column_blocks = 2, v_budget = 384 * 1024, m_budget = 128 * 1024;
#elif defined(QK_ISA_AVX2)
constexpr int64_t most_rows = 6, column_blocks = 1, v_budget = 192 * 1024, m_budget = 64 * 1024;
#else
constexpr int64_t most_rows = 4, column_blocks = 1, v_budget = 384 * 1024, m_budget = 128 * 1024;
#endif
constexpr double work_per_thread = 1 << 20;  // products; as in core/cut.h

#if !defined(QK_ISA_AMX)
template <int blocks>
ProductOf product_for(int64_t rows, bool pairs_fit) {
#if defined(QK_ISA_AVX512VNNI)
  switch (rows) {
    case 2: return product<2, blocks, false>;
    case 4: return product<4, blocks, false>;
    case 6: return product<6, blocks, false>;
    case 8: return product<8, blocks, false>;
    case 10: return product<10, blocks, false>;
    case 12: return product<12, blocks, false>;
    default: return product<14, blocks, false>;
  }
#else
  return pairs_fit ? product<most_rows, blocks, true> : product<most_rows, blocks, false>;
#endif
}
#endif

// How the work is cut. Tiles, numbered across images, go in groups of `rows`, groups in stretches whose V fits L2;
// blocks of output channels go in columns. A unit is a stretch x a column, and all columns of a
// stretch follow each other.
struct Plan {
  int64_t across, down, tiles;
  int64_t chunks, steps, vectors;  // of channels: 64, 4, and what a vector of codes holds
  int64_t rows, groups, batch;     // batch: groups whose sums wait for their transform together
  int64_t stretch, stretches, columns;
  int64_t units, workers;
  int64_t v_group, v_bytes, u_block, u_bytes, m_plane, m_group, m_bytes, bytes;
};

Plan plan_of(const Conv2dArgs& a) {
  const PackedLayout& l = a.layout;
  Plan p{};
  p.across = ceil_div(a.ow, 2), p.down = ceil_div(a.oh, 2), p.tiles = a.batch * p.across * p.down;
  p.chunks = ceil_div(a.shape.c, 64), p.steps = ceil_div(a.shape.c, 4);
  p.vectors = l.segment_padded * l.stored_bits / 32;
  p.columns = ceil_div(l.blocks_per_outer, column_blocks);
  const double work = static_cast<double>(p.tiles) * p.steps * 64 * 16 * static_cast<double>(l.blocks());
  const int64_t threads =
      least<int64_t>(thread_count(), most<int64_t>(1, static_cast<int64_t>(work / work_per_thread)));
  // Groups of equal size: 16 tiles are 8 and 8, not 14 and 2.
  p.rows = ceil_div(p.tiles, ceil_div(p.tiles, most_rows));
  p.rows = column_blocks == 1 || most_rows == 16 ? most_rows : round_up(p.rows, int64_t{2});
  p.groups = ceil_div(p.tiles, p.rows);
  p.v_group = p.chunks * v_chunk(p.rows);
  p.stretch = most<int64_t>(1, least(p.groups, v_budget / p.v_group));
  // Threads share the tiles, if there are enough of them, else the columns; one transforms weights twice, the other
  // inputs.
  if (threads > 1 && p.tiles > 9 * l.blocks_per_outer)
    p.stretch = least(p.stretch, most<int64_t>(1, p.groups / threads));
  p.stretches = ceil_div(p.groups, p.stretch);
  p.stretch = ceil_div(p.groups, p.stretches);
  p.units = l.outer * p.stretches * p.columns;
  p.workers = least(threads, p.units);
  p.u_block = p.chunks * u_chunk;
  p.u_bytes = column_blocks * p.u_block;
  p.v_bytes = p.stretch * p.v_group;
  p.m_plane = p.rows * column_blocks * block + block;
  p.m_group = positions * p.m_plane;
  p.batch = most<int64_t>(1, least(p.stretch, m_budget / (4 * p.m_group)));
  p.m_bytes = p.batch * p.m_group * 4;
  p.bytes = p.v_bytes + p.u_bytes + p.m_bytes + round_up(a.shape.c, line);
  return p;
}

class Worker {
 public:
  Worker(const Conv2dArgs& a, const Plan& p, uint8_t* memory)
      : a_(a),
        p_(p),
        l_(a.layout),
        v_(memory),
        u_(v_ + p.v_bytes),
        m_(reinterpret_cast<int32_t*>(u_ + p.u_bytes)),
        padding_(reinterpret_cast<uint8_t*>(m_) + p.m_bytes),
        result_(a.epilogue.out_step ? result_for<true>(a.epilogue) : result_for<false>(a.epilogue)) {
    std::memset(padding_, *a.epilogue.x_zero, static_cast<size_t>(round_up(a.shape.c, line)));
    PackedHeader header;
    std::memcpy(&header, a.weight, sizeof header);
    pairs_fit_ = header.pairs_fit != 0;
  }

  void run(int64_t begin, int64_t end) {
#if defined(QK_ISA_AMX)
    tiles_.set_rows(side);
    if (p_.steps % steps_per_chunk) std::memset(u_, 0, static_cast<size_t>(p_.u_bytes));
#endif
    int64_t stretch = -1, column = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const Place at = place(unit);
      if (at.column != column) weights(at);
      if (at.stretch != stretch) input(at);
      stretch = at.stretch, column = at.column;
      multiply(at);
    }
#if defined(QK_ISA_AMX)
    tiles_.release();
#endif
  }

 private:
  // Columns and stretches are counted through all groups of the convolution.
  struct Place {
    int64_t outer, stretch, column;
  };

  Place place(int64_t unit) const {
    const int64_t outer = unit / (p_.stretches * p_.columns), in = unit % (p_.stretches * p_.columns);
    const int64_t stretch = in / p_.columns, column = in % p_.columns;
    return {outer, outer * p_.stretches + stretch, outer * p_.columns + column};
  }

  // U of a column, and what its sums start with. The 128 in V are taken back, and x_zero: V of a constant image is 4 of
  // it at position (1, 1) and else 0, and that position is in all results with the sign +.
  void weights(const Place& at) {
    const int64_t in_outer = at.column % p_.columns * column_blocks;
    const int64_t first = at.outer * l_.blocks_per_outer + in_outer;
    blocks_ = least(column_blocks, l_.blocks_per_outer - in_outer);
    const uint32_t zero = static_cast<uint32_t>(*a_.epilogue.x_zero);
    for (int64_t b = 0; b < blocks_; ++b) {
      const WeightArgs w{a_.weight + l_.codes_at + (first + b) * l_.block_bytes,
                         a_.weight + l_.zeros_at + (first + b) * block, u_ + b * p_.u_block};
      if (l_.stored_bits == 4)
        transform_weights<4>(w, p_.vectors);
      else
        transform_weights<2>(w, p_.vectors);
      for (int64_t i = 0; i < positions; ++i) {
        const Words sums = load<Words>(a_.weight + l_.sums_at + ((first + b) * positions + i) * line);
        const Words start = sums * (0 - (i == 5 ? 4 * zero : 128u));
        std::memcpy(init_ + (i * blocks_ + b) * block, &start, sizeof start);
      }
    }
  }

  void input(const Place& at) {
    const int64_t outer = at.outer, first = at.stretch % p_.stretches * p_.stretch * p_.rows;
    const int64_t count = least(p_.stretch * p_.rows, p_.tiles - first);
    const int64_t c = a_.shape.c, pixel = c * a_.shape.groups, row = a_.w * pixel;
    const int64_t plane = v_plane(p_.rows), chunk = v_chunk(p_.rows), whole = c / 64, rest = c % 64;
    int64_t tx = first % p_.across, ty = first / p_.across % p_.down, image = first / p_.across / p_.down;
    for (int64_t t = 0; t < count; ++t) {
      uint8_t* to = v_ + t / p_.rows * p_.v_group + t % p_.rows * line;
      const int64_t x0 = 2 * tx - a_.pad_w, y0 = 2 * ty - a_.pad_h;
      const int64_t corner = ((image * a_.h + y0) * a_.w + x0) * pixel + outer * c;
      if (x0 >= 0 && y0 >= 0 && x0 + 4 <= a_.w && y0 + 4 <= a_.h && rest == 0) {
        const uint8_t* from = a_.x + corner;
        for (int64_t k = 0; k < whole; ++k, from += 64, to += chunk)
          input_tile([&](int i, int j) __attribute__((always_inline)) { return get(from + i * row + j * pixel); }, to,
                     plane);
      } else {
        const uint8_t* from[16];
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) {
            const bool inside = y0 + i >= 0 && y0 + i < a_.h && x0 + j >= 0 && x0 + j < a_.w;
            from[4 * i + j] = inside ? a_.x + corner + i * row + j * pixel : padding_;
          }
        for (int64_t k = 0; k < whole; ++k, to += chunk)
          input_tile([&](int i, int j) __attribute__((always_inline)) { return get(from[4 * i + j] + k * 64); }, to,
                     plane);
        if (rest)
          input_tile([&](int i, int j)
                         __attribute__((always_inline)) { return get_some(from[4 * i + j] + whole * 64, rest); },
                     to, plane);
      }
      if (++tx == p_.across) {
        tx = 0;
        if (++ty == p_.down) ty = 0, ++image;
      }
    }
  }

  void multiply(const Place& at) {
    const int64_t first = at.stretch % p_.stretches * p_.stretch, groups = least(p_.stretch, p_.groups - first);
    const int64_t n_column = at.column % p_.columns * column_blocks * block;
    ProductArgs p{};
    p.v_chunk = v_chunk(p_.rows), p.u_block = p_.u_block, p.steps = p_.steps;
    ResultArgs r{};
    r.m_plane = p_.m_plane, r.blocks = blocks_;
    r.across = p_.across, r.down = p_.down, r.oh = a_.oh, r.ow = a_.ow, r.n = a_.shape.n;
    r.n_first = at.outer * l_.n_per_outer + n_column, r.n_valid = l_.n_per_outer - n_column;
    r.most_sum = 255.0f * worst_weight(a_.shape.bits) * static_cast<float>(l_.k);
    r.epilogue = &a_.epilogue, r.out = a_.out;
#if !defined(QK_ISA_AMX)
    const ProductOf product =
        blocks_ == 1 ? product_for<1>(p_.rows, pairs_fit_) : product_for<column_blocks>(p_.rows, pairs_fit_);
#endif
    for (int64_t g = 0; g < groups; g += p_.batch) {
      const int64_t batch = least(p_.batch, groups - g);
      for (int64_t i = 0; i < positions; ++i)
        for (int64_t b = 0; b < batch; ++b) {
          p.v = v_ + (g + b) * p_.v_group + i * v_plane(p_.rows);
          p.u = u_ + i * u_plane;
          p.init = init_ + i * blocks_ * block;
          p.m = m_ + b * p_.m_group + i * p_.m_plane;
#if defined(QK_ISA_AMX)
          const bool pair = b + 1 < batch;
          const auto tiles = blocks_ == 1 ? pair ? tile_product<2, 1> : tile_product<1, 1>
                             : pair       ? tile_product<2, 2>
                                          : tile_product<1, 2>;
          tiles(p, p_.v_group, p_.m_group);
          b += pair;
#else
          product(p);
#endif
        }
      for (int64_t b = 0; b < batch; ++b) {
        r.first = (first + g + b) * p_.rows, r.count = least(p_.rows, p_.tiles - r.first);
        r.m = m_ + b * p_.m_group;
        result_(r);
      }
    }
  }

  const Conv2dArgs& a_;
  const Plan& p_;
  const PackedLayout& l_;
  uint8_t* v_;
  uint8_t* u_;
  int32_t* m_;
  uint8_t* padding_;
  ResultOf result_;
  int64_t blocks_ = 0;  // of the column
  bool pairs_fit_;
#if defined(QK_ISA_AMX)
  TileState tiles_;
#endif
  int32_t init_[positions * column_blocks * block];
};

}  // namespace
}  // namespace winograd_parts

void winograd(const Conv2dArgs& a) {
  using namespace winograd_parts;
  if (a.batch == 0) return;
  const Plan p = plan_of(a);
  parallel_for(p.workers, 1, [&](int64_t begin, int64_t end) {
    Worker worker(a, p, static_cast<uint8_t*>(thread_scratch(p.bytes)));
    worker.run(p.units * begin / p.workers, p.units * end / p.workers);
  });
}

// The largest |U| at any position that the taps g of one input and one output channel can make.
int64_t largest_transformed(const int* g) {
  int64_t all = 0, line = 0, one = 0;
  for (int i = 0; i < 3; ++i) {
    const auto size = [&](int at) { return static_cast<int64_t>(g[at] < 0 ? -g[at] : g[at]); };
    const int64_t row = size(3 * i) + size(3 * i + 1) + size(3 * i + 2), column = size(i) + size(i + 3) + size(i + 6);
    all += row, line = most(line, most(row, column));
    for (int j = 0; j < 3; ++j) one = most(one, size(3 * i + j));
  }
  return most(all, most(2 * line, 4 * one));
}

// Vectors as in the direct layout, of the nine taps in turn, and what the transformed weights add up to at each
// position.
void winograd_prepack(const PrepackArgs& a) {
  const PackedLayout& l = a.layout;
  PackedHeader header{packed_magic, a.shape.bits,   a.shape.n,        a.shape.kh,        a.shape.kw,
                      a.shape.c,    a.shape.groups, a.shape.k_groups, a.shape.algorithm, 0};
  std::memset(a.out, 0, static_cast<size_t>(l.bytes));
  int32_t pairs_fit = 1;
  const int64_t grain = most<int64_t>(1, grain_values / (PackedLayout::block * l.k_padded));
  const int bits = a.shape.bits, mask = top_code(bits);
  parallel_for(l.blocks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      for (int64_t i = 0; i < PackedLayout::block; ++i) {
        const int64_t in = at % l.blocks_per_outer * PackedLayout::block + i;
        if (in >= l.n_per_outer) break;
        const int64_t n = at / l.blocks_per_outer * l.n_per_outer + in;
        const uint8_t* row = a.packed + n * a.row_bytes;
        const int32_t zero = a.zero[n];
        int32_t taps[9] = {};
        int64_t before = 0;  // largest |U| of the channel before
        for (int64_t c = 0; c < l.segment_padded; ++c) {
          int g[9];
          for (int64_t t = 0; t < 9; ++t) {
            const int64_t k = t * a.shape.c + c;
            const int code = c < a.shape.c ? (row[k * bits / 8] >> (k * bits % 8)) & mask : zero;
            g[t] = code - zero;
            taps[t] += g[t];
            a.out[l.winograd_at(at, t, c, i)] |= static_cast<uint8_t>(code << l.winograd_bit(c));
          }
          const int64_t largest = largest_transformed(g);
          if (c % 2 && !weights_fit_pairs(before, largest)) __atomic_store_n(&pairs_fit, 0, __ATOMIC_RELAXED);
          before = largest;
        }
        int32_t half[4][3];
        for (int x = 0; x < 3; ++x) {
          half[0][x] = 2 * taps[x], half[3][x] = 2 * taps[6 + x];
          half[1][x] = taps[x] + taps[3 + x] + taps[6 + x], half[2][x] = taps[x] - taps[3 + x] + taps[6 + x];
        }
        for (int y = 0; y < 4; ++y) {
          const int32_t* h = half[y];
          const int32_t sums[4] = {2 * h[0], h[0] + h[1] + h[2], h[0] - h[1] + h[2], 2 * h[2]};
          for (int x = 0; x < 4; ++x)
            std::memcpy(a.out + l.sums_at + ((at * 16 + 4 * y + x) * PackedLayout::block + i) * 4, &sums[x], 4);
        }
        a.out[l.zeros_at + at * PackedLayout::block + i] = static_cast<uint8_t>(zero);
      }
  });
  header.pairs_fit = pairs_fit;
  std::memcpy(a.out, &header, sizeof header);
}

}  // namespace qk::cpu::QK_ISA
