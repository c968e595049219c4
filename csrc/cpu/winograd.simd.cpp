// Convolutions by Winograd's F(2 x 2, 3 x 3), exact in integers: docs/winograd.md.
#include "cpu/winograd.h"

#include "core/scratch.h"
#include "ops/conv2d.h"
#include "ops/prepack.h"

namespace qk::cpu::QK_ISA {
namespace winograd_parts {
namespace {

#if !defined(QK_ISA_GENERIC) && !defined(QK_ISA_AVX2)
constexpr int64_t most_rows = 14, column_blocks = 2, joined_rows = 6, few_rows = 16;
#else
constexpr int64_t most_rows = 4, column_blocks = 1, joined_rows = 0, few_rows = 0;
#endif
constexpr int64_t v_budget = 384 * 1024, m_budget = 128 * 1024;  // of L2 (1 MB and more), beside a column of weights
constexpr double work_per_thread = 1 << 20;                      // products; see igemm.h

template <int blocks>
ProductOf plane_for(int64_t rows) {
#if !defined(QK_ISA_GENERIC) && !defined(QK_ISA_AVX2)
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
  return product<most_rows, blocks, false>;
#endif
}

// For few tiles: `more` or not.
ProductOf chunk_for(int64_t rows, bool more) {
#if !defined(QK_ISA_GENERIC) && !defined(QK_ISA_AVX2)
  switch ((rows + 3) / 4) {
    case 1: return more ? product<4, 1, true> : product<4, 1, false>;
    case 2: return more ? product<8, 1, true> : product<8, 1, false>;
    case 3: return more ? product<12, 1, true> : product<12, 1, false>;
    default: return more ? product<16, 1, true> : product<16, 1, false>;
  }
#else
  return nullptr;
#endif
}

// How the work is cut. Tiles, numbered across images, go in groups of `rows`, groups in stretches whose V fits L2;
// blocks of output channels go in columns. A unit is a stretch x a column.
struct Plan {
  int64_t across, down, tiles;
  int64_t chunks, steps, vectors;  // of channels: 64, 4, and what a vector of codes holds
  bool joined;
  bool few;              // tiles: chunk by chunk of K, so that U stays in L1
  int64_t column_blocks;  // of a column
  int64_t rows, groups, batch;  // batch: groups whose sums wait for their transform together
  int64_t stretch, stretches, columns;
  bool columns_first;  // the order of units: all stretches of a column, or all columns of a stretch
  int64_t units, workers;
  int64_t v_group, v_bytes, u_block, u_bytes, m_plane, m_group, m_bytes, bytes;
};

Plan plan_of(const Conv2dArgs& a) {
  const PackedLayout& l = a.layout;
  Plan p{};
  p.across = ceil_div(a.ow, 2), p.down = ceil_div(a.oh, 2), p.tiles = a.batch * p.across * p.down;
  p.chunks = ceil_div(a.shape.c, 64), p.steps = ceil_div(a.shape.c, 4);
  p.vectors = l.segment_padded * l.stored_bits / 32;
  p.few = p.chunks > 1 && p.tiles <= few_rows;
  p.column_blocks = p.few ? 1 : column_blocks;
  p.columns = ceil_div(l.blocks_per_outer, p.column_blocks);
  const double work = static_cast<double>(p.tiles) * p.steps * 64 * 16 * static_cast<double>(l.blocks());
  const int64_t threads = least<int64_t>(thread_count(), most<int64_t>(1, static_cast<int64_t>(work / work_per_thread)));
  // Few channels: U of a column stays in L1, and sums of a row of positions are joined in registers.
  p.joined = joined_rows > 0 && p.chunks == 1;
  // Groups of equal size; 16 tiles are 8 and 8, not 14 and 2.
  const int64_t top = p.joined ? joined_rows : most_rows;
  p.rows = top;
  if (!p.joined && joined_rows > 0) p.rows = least(top, round_up(ceil_div(p.tiles, ceil_div(p.tiles, top)), int64_t{2}));
  if (p.few) p.rows = round_up(p.tiles, int64_t{4});
  p.groups = ceil_div(p.tiles, p.rows);
  p.v_group = p.chunks * v_chunk(p.rows);
  // With one or two columns it costs less to transform a group twice than to send V to L2 and back.
  p.columns_first = p.joined && p.columns <= 2;
  p.stretch = p.columns_first ? 1 : most<int64_t>(1, least(p.groups, v_budget / p.v_group));
  // Threads share the tiles, if there are enough of them, else the columns; one transforms weights twice, the other inputs.
  if (threads > 1 && p.tiles > 9 * l.blocks_per_outer) p.stretch = least(p.stretch, most<int64_t>(1, p.groups / threads));
  p.stretches = ceil_div(p.groups, p.stretch);
  p.stretch = ceil_div(p.groups, p.stretches);
  p.units = l.outer * p.stretches * p.columns;
  p.workers = least(threads, p.units);
  p.u_block = p.few ? u_chunk : p.chunks * u_chunk;
  p.u_bytes = p.column_blocks * p.u_block;
  p.v_bytes = p.stretch * p.v_group;
  p.m_plane = p.rows * p.column_blocks * block + block;
  p.m_group = positions * p.m_plane;
  p.batch = most<int64_t>(1, least(p.stretch, m_budget / (4 * p.m_group)));
  p.m_bytes = p.batch * p.m_group * 4;
  p.bytes = p.v_bytes + 2 * p.u_bytes + p.m_bytes + round_up(a.shape.c, line);
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
        m_(reinterpret_cast<int32_t*>(u_ + 2 * p.u_bytes)),
        padding_(reinterpret_cast<uint8_t*>(m_) + p.m_bytes),
        result_(p.joined ? result_for<true>(a.epilogue) : result_for<false>(a.epilogue)) {
    std::memset(padding_, *a.epilogue.x_zero, static_cast<size_t>(round_up(a.shape.c, line)));
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Place at = place(unit);
      if (unit == begin) {
        prepare(at.outer * p_.columns + at.column);
        if (!p_.few) make_weights(at_once);
        current_ = ahead_;
      }
      if (unit == begin || at.stretch != stretch_ || at.outer != outer_) input(at.outer, at.stretch);
      stretch_ = at.stretch, outer_ = at.outer;
      // The weights of the next unit are made between the products of this one: their stores go to L2 meanwhile.
      int64_t next = current_.column;
      if (unit + 1 < end) {
        const Place then = place(unit + 1);
        next = then.outer * p_.columns + then.column;
      }
      if (next != current_.column) prepare(next);
      if (p_.few)
        multiply_few(at);
      else
        multiply(at), make_weights(at_once);
      current_ = ahead_;
    }
  }

 private:
  static constexpr int64_t at_once = INT64_MAX;
  struct Place {
    int64_t outer, stretch, column;
  };
  // A column of U, made up to vector `made` of all of its blocks.
  struct Column {
    int64_t column, blocks, made, wanted;
    uint8_t* u;
    int32_t init[positions * column_blocks * block];
  };

  Place place(int64_t unit) const {
    const int64_t per_outer = p_.stretches * p_.columns, in = unit % per_outer;
    if (p_.columns_first) return {unit / per_outer, in % p_.stretches, in / p_.stretches};
    return {unit / per_outer, in / p_.columns, in % p_.columns};
  }

  void prepare(int64_t column) {
    Column& c = ahead_;
    const int64_t first = first_block(column);
    c.column = column;
    c.blocks = least(p_.column_blocks, l_.blocks_per_outer - column % p_.columns * p_.column_blocks);
    c.made = 0, c.wanted = c.blocks * p_.vectors;
    c.u = current_.u == u_ ? u_ + p_.u_bytes : u_;
    // The 128 in V are taken back, and x_zero: as V of a constant image is 4 of it at position (1, 1) and else 0,
    // and that position is in all results with the sign +.
    const uint32_t zero = static_cast<uint32_t>(*a_.epilogue.x_zero);
    for (int64_t i = 0; i < positions; ++i)
      for (int64_t b = 0; b < c.blocks; ++b) {
        const Words sums = load<Words>(a_.weight + l_.sums_at + ((first + b) * positions + i) * line);
        const Words start = sums * (0 - (i == 5 ? 4 * zero : 128u));
        std::memcpy(c.init + (i * c.blocks + b) * block, &start, sizeof start);
      }
  }

  int64_t first_block(int64_t column) const {
    return column / p_.columns * l_.blocks_per_outer + column % p_.columns * p_.column_blocks;
  }

  void make_weights(int64_t vectors) {
    Column& c = ahead_;
    while (vectors > 0 && c.made < c.wanted) {
      const int64_t b = c.made / p_.vectors, begin = c.made % p_.vectors;
      const int64_t end = begin + least(vectors, p_.vectors - begin), at = first_block(c.column) + b;
      transform(at, begin, end, c.u + b * p_.u_block);
      c.made += end - begin;
      vectors -= end - begin;
    }
  }

  void transform(int64_t block_index, int64_t begin, int64_t end, uint8_t* u) const {
    const WeightArgs w{a_.weight + l_.codes_at + block_index * l_.block_bytes, a_.weight + l_.zeros_at + block_index * block,
                       u};
    if (l_.stored_bits == 4)
      transform_weights<4>(w, begin, end);
    else
      transform_weights<2>(w, begin, end);
  }

  void input(int64_t outer, int64_t stretch) {
    const int64_t first = stretch * p_.stretch * p_.rows, count = least(p_.stretch * p_.rows, p_.tiles - first);
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
          input_tile(
              [&](int i, int j) __attribute__((always_inline)) { return get_some(from[4 * i + j] + whole * 64, rest); },
              to, plane);
      }
      if (++tx == p_.across) {
        tx = 0;
        if (++ty == p_.down) ty = 0, ++image;
      }
    }
  }

  void multiply(const Place& at) {
    const Column& c = current_;
    const int64_t first = at.stretch * p_.stretch, groups = least(p_.stretch, p_.groups - first);
    ProductArgs product{};
    product.v_plane = v_plane(p_.rows), product.v_chunk = v_chunk(p_.rows);
    product.u_block = p_.u_block;
    product.steps = p_.steps;
    product.m_plane = p_.m_plane;
    ResultArgs r = result_args(at);
    // So many vectors of the next column between two products that it is ready in the end.
    const int64_t calls = groups * (p_.joined ? 4 : positions), share = ceil_div(ahead_.wanted, calls);
    const ProductOf plane = c.blocks == 1 ? plane_for<1>(p_.rows) : plane_for<column_blocks>(p_.rows);
    for (int64_t g = 0; g < groups; g += p_.batch) {
      const int64_t batch = least(p_.batch, groups - g);
      for (int64_t i = 0; i < positions; i += p_.joined ? 4 : 1)
        for (int64_t b = 0; b < batch; ++b) {
          product.v = v_ + (g + b) * p_.v_group + i * product.v_plane;
          product.u = c.u + i * u_plane;
          product.init = c.init + i * c.blocks * block;
          product.m = m_ + b * p_.m_group + (p_.joined ? i / 2 : i) * p_.m_plane;
          if (p_.joined)
            joined(product, c.blocks);
          else
            plane(product);
          make_weights(share);
        }
      for (int64_t b = 0; b < batch; ++b) {
        r.first = (first + g + b) * p_.rows, r.count = least(p_.rows, p_.tiles - r.first);
        r.m = m_ + b * p_.m_group;
        result_(r);
      }
    }
  }

  // One group of tiles and one block: chunk by chunk of K.
  void multiply_few(const Place& at) {
    ProductArgs product{};
    product.u_block = u_chunk, product.m_plane = p_.m_plane;
    const int64_t chunk_vectors = steps_per_chunk * l_.stored_bits / 8;
    const ProductOf first = chunk_for(p_.rows, false), more = chunk_for(p_.rows, true);
    for (int64_t k = 0; k < p_.chunks; ++k) {
      transform(first_block(current_.column), k * chunk_vectors, least(p_.vectors, (k + 1) * chunk_vectors),
                u_ - k * u_chunk);
      product.steps = least(steps_per_chunk, p_.steps - k * steps_per_chunk);
      for (int64_t i = 0; i < positions; ++i) {
        product.v = v_ + k * v_chunk(p_.rows) + i * v_plane(p_.rows);
        product.u = u_ + i * u_plane;
        product.init = current_.init + i * block;
        product.m = m_ + i * p_.m_plane;
        (k ? more : first)(product);
      }
    }
    ResultArgs r = result_args(at);
    r.first = 0, r.count = p_.tiles, r.m = m_;
    result_(r);
  }

  ResultArgs result_args(const Place& at) const {
    const int64_t n_column = at.column * p_.column_blocks * block;
    ResultArgs r{};
    r.m_plane = p_.m_plane, r.rows = p_.rows, r.blocks = current_.blocks;
    r.across = p_.across, r.down = p_.down, r.oh = a_.oh, r.ow = a_.ow, r.n = a_.shape.n;
    r.n_first = at.outer * l_.n_per_outer + n_column, r.n_valid = l_.n_per_outer - n_column;
    r.epilogue = &a_.epilogue, r.out = a_.out;
    return r;
  }

  // Six tiles: 3 x 4 positions x 2 blocks of sums at a time, or 6 x 4 x 1.
  static void joined(ProductArgs a, int64_t blocks) {
#if !defined(QK_ISA_GENERIC) && !defined(QK_ISA_AVX2)
    if (blocks == 1) return joined_product<6, 1>(a);
    joined_product<3, 2>(a);
    a.v += 3 * line;
    a.m += 3 * 2 * block;
    joined_product<3, 2>(a);
#endif
  }

  const Conv2dArgs& a_;
  const Plan& p_;
  const PackedLayout& l_;
  uint8_t* v_;
  uint8_t* u_;
  int32_t* m_;
  uint8_t* padding_;
  ResultOf result_;
  int64_t stretch_ = 0, outer_ = 0;
  Column current_{}, ahead_{};
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

// Vectors as in the direct layout, of the nine taps in turn, and what the transformed weights add up to at each position.
void winograd_prepack(const PrepackArgs& a) {
  const PackedLayout& l = a.layout;
  const PackedHeader header{packed_magic, a.shape.bits,   a.shape.n,        a.shape.kh,        a.shape.kw,
                            a.shape.c,    a.shape.groups, a.shape.k_groups, a.shape.algorithm, 0};
  std::memset(a.out, 0, static_cast<size_t>(l.bytes));
  std::memcpy(a.out, &header, sizeof header);
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
        for (int64_t t = 0; t < 9; ++t)
          for (int64_t c = 0; c < l.segment_padded; ++c) {
            const int64_t k = t * a.shape.c + c;
            const int code = c < a.shape.c ? (row[k * bits / 8] >> (k * bits % 8)) & mask : zero;
            taps[t] += code - zero;
            a.out[l.winograd_at(at, t, c, i)] |= static_cast<uint8_t>(code << l.winograd_bit(c));
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
}

}  // namespace qk::cpu::QK_ISA
