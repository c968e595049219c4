// What network prepares once for shapes that it has not seen before: the sizes of all values, the arguments of every
// kernel but for the addresses, and where each value lies.
#pragma once
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "core/arena.h"
#include "core/program.h"
#include "core/register.h"
#include "ops/add.h"
#include "ops/attention.h"
#include "ops/attention_check.h"
#include "ops/concat.h"
#include "ops/conv2d.h"
#include "ops/dequantize.h"
#include "ops/gemm.h"
#include "ops/index_put.h"
#include "ops/index_select.h"
#include "ops/integer.h"
#include "ops/lookup.h"
#include "ops/multiply.h"
#include "ops/pool.h"
#include "ops/quantize.h"
#include "ops/sparq.h"

namespace qk {
namespace {

using Sizes = std::vector<int64_t>;

struct Concat {
  ConcatArgs args;
  std::vector<ConcatPart> parts;
};

struct Nothing {};  // a step without work: reshape, or an empty result

using StepArgs =
    std::variant<Nothing, QuantizeArgs, QuantizeTransposedArgs, Conv2dArgs, GemmArgs, AddArgs, MultiplyArgs, PoolArgs,
                 LookupArgs, SparqArgs, Concat, AttentionArgs, IndexPutArgs, IndexSelectArgs, DequantizeArgs>;

// The four tensors of constants.
struct Constants {
  const float* steps;
  const int32_t* zeros;
  const float* floats;
  const uint8_t* bytes;
  int64_t scales, float_count, byte_count;

  // The offset is a multiple of 4.
  const int32_t* columns(int64_t offset) const {
    check(reinterpret_cast<uintptr_t>(bytes) % alignof(int32_t) == 0, "network", "constants[3], the bytes,",
          "at a multiple of 4 bytes", "a view that is not");
    return reinterpret_cast<const int32_t*>(bytes + offset);
  }
};

// How an input lies: as its sizes say, or with its second axis last (a channels_last image).
enum class Lies { dense, channels_last };

struct Plan {
  std::shared_ptr<const Program> program;
  std::vector<Sizes> input_sizes;
  std::vector<Lies> input_lies;
  int64_t scales, float_count, byte_count;  // of the constants that it was made for, at least
  std::vector<PackedHeader> headers;        // by step; on the CPU
  std::vector<Sizes> sizes;                 // by value
  std::vector<int64_t> at;                  // by value: in the arena, -1 elsewhere
  std::vector<StepArgs> args;               // by step
  int64_t arena_bytes;
};

inline int64_t count(const Sizes& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

class Planner {
 public:
  Planner(Plan& plan, const Constants& constants, const Tensor& bytes, bool reuse)
      : plan_(plan), program_(*plan.program), constants_(constants), bytes_(bytes), reuse_(reuse) {}

  // plan.input_sizes and input_lies are known.
  void run() {
    plan_.sizes.resize(program_.values.size());
    plan_.headers.resize(program_.steps.size());
    for (size_t i = 0; i < program_.inputs.size(); ++i) {
      Sizes& sizes = plan_.sizes[program_.inputs[i]] = plan_.input_sizes[i];
      op_ = "network";
      checked(("inputs[" + std::to_string(i) + "]").c_str(), sizes);
    }
    const int64_t scales = static_cast<int64_t>(program_.scale_bits.size());
    check(constants_.scales >= scales, op_, "constants[0]", ("steps of " + std::to_string(scales) + " scales").c_str(),
          constants_.scales);
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      op_ = program_.steps[i].where.c_str();
      plan_.args.push_back(step(program_.steps[i], plan_.headers[i]));
      Sizes& sizes = plan_.sizes[program_.steps[i].out];
      checked("the result", sizes);
      if (count(sizes) == 0) plan_.args.back() = Nothing{};
    }
    place_values();
  }

 private:
  Plan& plan_;
  const Program& program_;
  const Constants& constants_;
  const Tensor& bytes_;
  bool reuse_;
  const char* op_ = "network";

  const Sizes& in(const Step& s, int i) const { return plan_.sizes[s.in[i]]; }
  bool codes(int value) const { return program_.values[value].scale.codes(); }

  // Every size fits 2^31, all but the first are positive, and so is their product.
  void checked(const char* what, const Sizes& sizes) const {
    int64_t all = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      check_size(op_, what, sizes[i], i ? 1 : 0);
      const int64_t size = sizes[i] ? sizes[i] : 1;
      if (__builtin_mul_overflow(all, size, &all) || all > values_limit)
        fail(op_, what, "at most 2^47 values", text_of(sizes));
    }
  }
  void demand(bool holds, const char* what, const char* expected, const Sizes& got) const {
    if (!holds) fail(op_, what, expected, text_of(got));
  }

  void inside(const char* name, int64_t offset, int64_t values, bool floats) const {
    const int64_t all = floats ? constants_.float_count : constants_.byte_count;
    if (offset + values > all)
      fail(op_, name, "inside of the " + std::to_string(all) + (floats ? " floats" : " bytes") + " of constants",
           std::to_string(values) + " from " + std::to_string(offset));
  }

  // All but the last size; a single one may be 0.
  static int64_t rows_of(const Sizes& x) { return x.back() ? count(x) / x.back() : 0; }

  StepArgs step(const Step& s, PackedHeader& header) {
    const Sizes& x = in(s, 0);
    Sizes& out = plan_.sizes[s.out];
    switch (s.op) {
      case StepOp::quantize: return quantize(s, x, out);
      case StepOp::conv2d: return conv2d(s, x, out, header);
      case StepOp::gemm: return gemm(s, x, out, header);
      case StepOp::add: {
        demand(x == in(s, 1), "the second input", ("of the shape of the first, " + text_of(x)).c_str(), in(s, 1));
        out = x;
        AddArgs a{};
        a.out = result(s);
        a.values = count(x);
        return a;
      }
      case StepOp::multiply: {
        demand(x.size() == 4, "the first input", "[B, H, W, C]", x);
        const Sizes gate{x[0], 1, 1, x[3]};
        demand(in(s, 1) == gate, "the second input", ("the gate " + text_of(gate)).c_str(), in(s, 1));
        out = x;
        MultiplyArgs a{};
        a.out = result(s);
        a.images = x[0], a.pixels = x[1] * x[2], a.channels = x[3];
        return a;
      }
      case StepOp::pool: return pool(s, x, out);
      case StepOp::lookup: {
        inside("table", s.table, 256, !s.scale.codes());
        out = x;
        LookupArgs a{};
        a.values = count(x);
        a.floats = !s.scale.codes();
        return a;
      }
      case StepOp::sparq: return sparq(s, x, out);
      case StepOp::concat: return concat(s, x, out);
      case StepOp::attention: {
        AttentionArgs a =
            attention_args(op_, x, in(s, 1), in(s, 2), s.in.size() > 3 ? &in(s, 3) : nullptr, s.heads, s.score_scale);
        a.out = result(s);
        out = {a.batch, a.queries, a.heads * a.width};
        return a;
      }
      case StepOp::index_put: return index_put(s, x, out);
      case StepOp::index_select: {
        demand(!x.empty(), "the input", "[..., C]", x);
        columns("index", s.index, s.count);
        out = x;
        out.back() = s.count;
        IndexSelectArgs a{};
        a.cols = x.back(), a.rows = rows_of(x), a.count = s.count;
        return a;
      }
      case StepOp::reshape: out = reshaped(s, x); return Nothing{};
      case StepOp::dequantize: {
        out = x;
        DequantizeArgs a{};
        a.rows = 1, a.cols = count(x);
        return a;
      }
    }
    return Nothing{};
  }

  static Result result(const Step& s) {
    Result r{};
    r.activation = s.activation;
    r.bits = s.scale.codes() ? s.scale.bits : 8;
    return r;
  }

  StepArgs quantize(const Step& s, const Sizes& x, Sizes& out) {
    out = x;
    const Value& root = program_.values[program_.values[s.in[0]].root];
    if (s.channels_first) {
      demand(x.size() >= 3, "the input", "[B, C, ...]", x);
      out.erase(out.begin() + 1);
      out.push_back(x[1]);
      const bool lies_so = root.input >= 0 && plan_.input_lies[root.input] == Lies::channels_last;
      if (!lies_so && x[1] > 1 && count(x) != x[0] * x[1]) {
        QuantizeTransposedArgs a{};
        a.images = x[0], a.channels = x[1], a.pixels = x[0] ? count(x) / (x[0] * x[1]) : 0;
        a.bits = s.scale.bits;
        return a;
      }
    }
    QuantizeArgs a{};
    a.rows = 1, a.cols = count(x);
    a.bits = s.scale.bits;
    return a;
  }

  Epilogue epilogue(const Step& s) const {
    Epilogue e{};
    e.activation = s.activation;
    e.x_bits = program_.values[s.in[0]].scale.bits;
    e.out_bits = s.scale.codes() ? s.scale.bits : 8;
    return e;
  }

  // Completes the shape of the weight; checks what belongs to it, and the residual.
  PackedLayout weight(const Step& s, WeightShape& shape, int64_t k, const Sizes& out_but_n, Sizes& out,
                      PackedHeader& header) {
    check(k % s.k_groups == 0, op_, "k_groups", ("a divisor of K = " + std::to_string(k)).c_str(), s.k_groups);
    check(s.n % s.groups == 0, op_, "groups", "a divisor of n", s.groups);
    product(op_, "n times K", {s.n, k});
    shape.n = s.n, shape.k_groups = s.k_groups, shape.bits = s.bits;
    inside("weight_step", s.weight_step, s.n * s.k_groups, true);
    if (s.bias >= 0) inside("bias", s.bias, s.n, true);
    inside("weight", s.weight, sizeof(PackedHeader), false);
    Tensor view = bytes_;  // shares its memory
    const int x_bits = program_.values[s.in[0]].scale.bits;
    if (s.op == StepOp::conv2d)
      shape.algorithm = packed_algorithm(torch::stable::narrow(view, 0, s.weight, sizeof(PackedHeader)));
    if (shape.algorithm == Algorithm::winograd) check_winograd(op_, shape, s.stride, s.dilation, x_bits);
    const int64_t bytes = QK_DEVICE::packed_layout(shape).bytes;
    inside("weight", s.weight, bytes, false);
    const PackedLayout layout = check_prepacked(op_, torch::stable::narrow(view, 0, s.weight, bytes), shape);
    if (bytes_.is_cpu()) std::memcpy(&header, constants_.bytes + s.weight, sizeof header);
    check(shape.group_k() <= longest_k(x_bits, shape.bits), op_, "K", "short enough for a sum in int32",
          shape.group_k(), "Use fewer bits, or weight steps by groups along K.");
    out = out_but_n;
    out.push_back(shape.n);
    if (s.in.size() == 2)
      demand(in(s, 1) == out, "the residual", ("of the result's shape " + text_of(out)).c_str(), in(s, 1));
    return layout;
  }

  int64_t window(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                 bool ceil_mode) const {
    const int64_t reach = dilation * (kernel - 1) + 1, padded = size + 2 * pad;
    if (reach > padded)
      fail(op_, axis, "at least as large as the kernel's reach " + std::to_string(reach) + " with padding",
           std::to_string(padded));
    const int64_t out = (padded - reach + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    // As torch: the last window begins inside of x or its left padding.
    return ceil_mode && (out - 1) * stride >= size + pad ? out - 1 : out;
  }

  StepArgs conv2d(const Step& s, const Sizes& x, Sizes& out, PackedHeader& header) {
    demand(x.size() == 4, "the input", "[B, H, W, C]", x);
    for (int64_t side : s.kernel) check_size(op_, "kernel", side, 1);
    check(x[3] % s.groups == 0, op_, "groups", "a divisor of the channels of x", s.groups);
    const int64_t c = x[3] / s.groups, k = product(op_, "K", {s.kernel[0], s.kernel[1], c});
    check_size(op_, "K", k, 1);
    WeightShape shape{};
    shape.kh = s.kernel[0], shape.kw = s.kernel[1], shape.c = c, shape.groups = s.groups;
    const int64_t oh = window("H of x", x[1], s.kernel[0], s.stride[0], s.padding[0], s.dilation[0], false);
    const int64_t ow = window("W of x", x[2], s.kernel[1], s.stride[1], s.padding[1], s.dilation[1], false);
    Conv2dArgs a{};
    a.layout = weight(s, shape, k, {x[0], oh, ow}, out, header);
    a.batch = x[0], a.h = x[1], a.w = x[2], a.oh = oh, a.ow = ow;
    a.stride_h = s.stride[0], a.stride_w = s.stride[1], a.pad_h = s.padding[0], a.pad_w = s.padding[1];
    a.dilation_h = s.dilation[0], a.dilation_w = s.dilation[1];
    a.shape = shape;
    a.epilogue = epilogue(s);
    return a;
  }

  StepArgs gemm(const Step& s, const Sizes& x, Sizes& out, PackedHeader& header) {
    demand(!x.empty(), "the input", "[..., K]", x);
    const int64_t k = x.back(), m = rows_of(x);
    check_size(op_, "rows of x", m, 0);
    WeightShape shape{};
    shape.kh = shape.kw = shape.groups = 1, shape.c = k;
    GemmArgs a{};
    a.layout = weight(s, shape, k, Sizes(x.begin(), x.end() - 1), out, header);
    product(op_, "the result", {m, shape.n});
    a.m = m;
    a.shape = shape;
    a.epilogue = epilogue(s);
    return a;
  }

  StepArgs pool(const Step& s, const Sizes& x, Sizes& out) {
    demand(x.size() == 4, "the input", "[B, H, W, C]", x);
    const bool global = s.kernel == Pair{0, 0};
    const Pair kernel = global ? Pair{x[1], x[2]} : s.kernel;
    for (int side = 0; side < 2; ++side) {
      check_size(op_, "kernel", kernel[side], 1);
      check(2 * s.padding[side] <= kernel[side], op_, "padding", "at most half of the kernel", s.padding[side]);
      check(s.max || s.dilation[side] == 1, op_, "dilation", "1 for mode average", s.dilation[side]);
    }
    const int64_t inside = std::min(kernel[0], x[1]) * std::min(kernel[1], x[2]);
    check(s.max || inside <= INT32_MAX / 255, op_, "the window", "of at most 2^23 positions for a sum in int32",
          inside);
    PoolArgs a{};
    a.out = result(s);
    a.mode = s.max ? PoolMode::max : PoolMode::average;
    a.images = x[0], a.h = x[1], a.w = x[2], a.channels = x[3];
    a.kernel_h = kernel[0], a.kernel_w = kernel[1];
    a.stride_h = s.stride[0], a.stride_w = s.stride[1], a.pad_h = s.padding[0], a.pad_w = s.padding[1];
    a.dilation_h = s.dilation[0], a.dilation_w = s.dilation[1];
    a.count_padding = s.count_include_pad;
    a.oh = window("H of x", x[1], kernel[0], s.stride[0], s.padding[0], s.dilation[0], s.ceil_mode);
    a.ow = window("W of x", x[2], kernel[1], s.stride[1], s.padding[1], s.dilation[1], s.ceil_mode);
    out = {x[0], a.oh, a.ow, x[3]};
    return a;
  }

  StepArgs sparq(const Step& s, const Sizes& x, Sizes& out) const {
    demand(!x.empty(), "the input", "[..., cols]", x);
    constexpr int bits[] = {4, 4, 4, 3, 2}, strides[] = {1, 2, 4, 1, 1};  // as program.cpp lists the families
    out = x;
    SparqArgs a{};
    a.cols = s.pairs ? x.back() : count(x);
    a.rows = a.cols ? count(x) / a.cols : 0;
    a.bits = bits[s.family], a.stride = strides[s.family];
    a.round = s.round, a.pairs = s.pairs;
    return a;
  }

  // int32 among the bytes.
  void columns(const char* name, int64_t offset, int64_t values) const {
    check(offset % sizeof(int32_t) == 0, op_, name, "at a multiple of 4 bytes", offset);
    inside(name, offset, values * static_cast<int64_t>(sizeof(int32_t)), false);
  }

  StepArgs index_put(const Step& s, const Sizes& x, Sizes& out) const {
    demand(!x.empty(), "the first input", "[..., N]", x);
    const Sizes& added = in(s, 1);
    const bool fits = added.size() == x.size() && std::equal(x.begin(), x.end() - 1, added.begin());
    demand(fits, "the second input", ("of the shape of the first but for its last size, " + text_of(x)).c_str(), added);
    if (s.in.size() > 2) demand(in(s, 2) == x, "the residual", ("of the shape " + text_of(x)).c_str(), in(s, 2));
    columns("index", s.index, s.count);
    columns("source", s.source, s.terms * s.count);
    out = x;
    IndexPutArgs a{};
    a.out = result(s);
    a.cols = x.back(), a.rows = rows_of(x), a.added_cols = added.back();
    a.count = s.count, a.terms = s.terms;
    return a;
  }

  StepArgs concat(const Step& s, const Sizes& x, Sizes& out) {
    demand(!x.empty(), "the first input", "[..., C]", x);
    Concat c{};
    out = x;
    out.back() = 0;
    for (size_t i = 0; i < s.in.size(); ++i) {
      const Sizes& part = in(s, static_cast<int>(i));
      const bool fits = part.size() == x.size() && std::equal(x.begin(), x.end() - 1, part.begin());
      demand(fits, "every input", ("of the shape of the first but for its last size, " + text_of(x)).c_str(), part);
      c.parts.push_back({nullptr, part.back(), nullptr, nullptr});
      out.back() += part.back();  // below 4096 * 2^31
    }
    c.args.count = static_cast<int64_t>(c.parts.size());
    c.args.pixels = rows_of(x);
    c.args.channels = out.back();
    c.args.out_bits = s.scale.bits;
    return c;
  }

  Sizes reshaped(const Step& s, const Sizes& x) const {
    Sizes out = s.shape;
    int64_t rest = 1, others = 1, open = -1;  // sizes that are copied cancel: a batch of 0 leaves the rest known
    for (size_t i = 0; i < x.size(); ++i)
      if (i >= out.size() || out[i] != 0) rest *= x[i];
    for (size_t i = 0; i < out.size(); ++i) {
      if (out[i] == -1) open = static_cast<int64_t>(i);
      if (out[i] > 0) demand(!__builtin_mul_overflow(others, out[i], &others), "shape", "that of as many values", out);
      if (out[i] != 0) continue;
      demand(i < x.size(), "shape", ("one that copies sizes of the input " + text_of(x)).c_str(), out);
      out[i] = x[i];
    }
    const std::string expected = "one of as many values as the input " + text_of(x);
    demand(open >= 0 ? rest % others == 0 : rest == others, "shape", expected.c_str(), out);
    if (open >= 0) out[open] = rest / others;
    return out;
  }

  // Whether the result may lie where this input lies.
  static bool in_place(const Step& s, size_t i) {
    switch (s.op) {
      case StepOp::add: return true;
      case StepOp::multiply: return i == 0;
      case StepOp::index_put: return i == 0;
      case StepOp::lookup: return s.scale.codes();
      default: return false;
    }
  }

  void place_values() {
    const auto& values = program_.values;
    std::vector<Interval> blocks;
    std::vector<int> block(values.size(), -1);
    for (const Step& s : program_.steps) {
      const Value& out = values[s.out];
      if (out.root != s.out || out.output >= 0) continue;  // a reshape, or a result
      const int64_t bytes = count(plan_.sizes[s.out]) * (out.scale.codes() ? 1 : 4);
      for (size_t i = 0; reuse_ && i < s.in.size() && block[s.out] < 0; ++i) {
        const int root = values[s.in[i]].root;
        if (!in_place(s, i) || block[root] < 0 || values[root].last != out.made || codes(root) != codes(s.out))
          continue;
        if (count(plan_.sizes[root]) != count(plan_.sizes[s.out])) continue;
        if (s.op != StepOp::add &&
            std::count_if(s.in.begin(), s.in.end(), [&](int v) { return values[v].root == root; }) > 1)
          continue;
        block[s.out] = block[root];
        blocks[block[root]].end = out.last;
      }
      if (block[s.out] >= 0) continue;
      block[s.out] = static_cast<int>(blocks.size());
      blocks.push_back({bytes, out.made, out.last, 0});
    }
    plan_.arena_bytes = place(blocks, reuse_);
    check(plan_.arena_bytes < arena_limit, "network", "the values", "of less than 2^50 bytes", "more");
    plan_.at.assign(values.size(), -1);
    for (size_t v = 0; v < values.size(); ++v)
      if (const int b = block[values[v].root]; b >= 0) plan_.at[v] = blocks[b].at;
  }
};

}  // namespace
}  // namespace qk
