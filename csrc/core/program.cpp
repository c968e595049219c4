#include "core/program.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

namespace qk {
namespace {

constexpr int max_id = 1 << 20;
constexpr size_t kept_programs = 64;

// A key's bit says where it may stand.
enum Key : uint32_t {
  weight = 1 << 0,
  weight_step = 1 << 1,
  bias = 1 << 2,
  table = 1 << 3,
  bits = 1 << 4,
  n = 1 << 5,
  k_groups = 1 << 6,
  kernel = 1 << 7,
  stride = 1 << 8,
  padding = 1 << 9,
  dilation = 1 << 10,
  groups = 1 << 11,
  activation = 1 << 12,
  layout = 1 << 13,
  mode = 1 << 14,
  ceil_mode = 1 << 15,
  count_include_pad = 1 << 16,
  shape = 1 << 17,
  out_scale = 1 << 18,
  out_bits = 1 << 19,
  family = 1 << 20,
  round = 1 << 21,
  pairs = 1 << 22,
  heads = 1 << 23,
  score_scale = 1 << 24,
  index = 1 << 25,
  source = 1 << 26,
  count = 1 << 27,
  terms = 1 << 28,
};
constexpr std::string_view key_names[] = {"weight",
                                          "weight_step",
                                          "bias",
                                          "table",
                                          "bits",
                                          "n",
                                          "k_groups",
                                          "kernel",
                                          "stride",
                                          "padding",
                                          "dilation",
                                          "groups",
                                          "activation",
                                          "layout",
                                          "mode",
                                          "ceil_mode",
                                          "count_include_pad",
                                          "shape",
                                          "out_scale",
                                          "out_bits",
                                          "family",
                                          "round",
                                          "pairs",
                                          "heads",
                                          "score_scale",
                                          "index",
                                          "source",
                                          "count",
                                          "terms"};
constexpr uint32_t matrix = weight | weight_step | bits | n | k_groups, window = kernel | stride | padding | dilation,
                   scale = out_scale | out_bits;

struct Signature {
  std::string_view name;
  StepOp op;
  size_t least, most;  // inputs
  uint32_t needed, optional;
};
constexpr Signature signatures[] = {
    {"quantize", StepOp::quantize, 1, 1, layout | scale, 0},
    {"conv2d", StepOp::conv2d, 1, 2, matrix | window | groups | activation, bias | scale},
    {"gemm", StepOp::gemm, 1, 2, matrix | activation, bias | scale},
    {"add", StepOp::add, 2, 2, activation, scale},
    {"multiply", StepOp::multiply, 2, 2, activation, scale},
    {"pool", StepOp::pool, 1, 1, mode | window | ceil_mode | count_include_pad, scale},
    {"lookup", StepOp::lookup, 1, 1, table, scale},
    {"sparq", StepOp::sparq, 1, 1, family | round | pairs, 0},
    {"concat", StepOp::concat, 1, 4096, scale, 0},
    {"attention", StepOp::attention, 3, 4, heads | score_scale, scale},
    {"index_put", StepOp::index_put, 2, 3, index | source | count | terms | activation, scale},
    {"index_select", StepOp::index_select, 1, 1, index | count, 0},
    {"reshape", StepOp::reshape, 1, 1, shape, 0},
    {"dequantize", StepOp::dequantize, 1, 1, 0, 0},
};

struct Parser {
  Program& p;
  int line = 0;
  std::unordered_map<int64_t, int> known{};  // id -> index of the value

  [[noreturn]] void wrong(const std::string& what) const {
    throw std::runtime_error("qk::network: program must be well formed, got line " + std::to_string(line) + ": " +
                             what + ". Make it with qk.deploy.program.");
  }
  void demand(bool holds, const char* what) const {
    if (!holds) wrong(what);
  }
  static std::string quoted(std::string_view word) { return '"' + std::string(word.substr(0, 80)) + '"'; }

  int64_t number(std::string_view word) const {
    const bool negative = !word.empty() && word[0] == '-';
    const std::string_view digits = word.substr(negative);
    int64_t value = 0;
    for (char c : digits) {
      if (c < '0' || c > '9' || digits.size() > 15) wrong(quoted(word) + " must be a number");
      value = value * 10 + (c - '0');
    }
    if (digits.empty()) wrong(quoted(word) + " must be a number");
    return negative ? -value : value;
  }
  int64_t number(std::string_view word, int64_t least, int64_t most, std::string_view name) const {
    const int64_t value = number(word);
    if (value < least || value > most)
      wrong(std::string(name) + " must be from " + std::to_string(least) + " to " + std::to_string(most) + ", not " +
            std::to_string(value));
    return value;
  }
  int64_t offset(std::string_view word, std::string_view name) const {
    return number(word, 0, (int64_t{1} << 48) - 1, name);
  }
  std::vector<int64_t> list(std::string_view word, int64_t least, std::string_view name) const {
    std::vector<int64_t> numbers;
    for (size_t at = 0; at <= word.size();) {
      const size_t comma = std::min(word.find(',', at), word.size());
      numbers.push_back(number(word.substr(at, comma - at), least, INT32_MAX, name));
      at = comma + 1;
    }
    return numbers;
  }
  Pair pair(std::string_view word, int64_t least, std::string_view name) const {
    const auto numbers = list(word, least, name);
    if (numbers.size() != 2) wrong(std::string(name) + " must be two numbers");
    return {numbers[0], numbers[1]};
  }
  // Which of the choices.
  int choice(std::string_view word, std::initializer_list<std::string_view> choices, std::string_view name) const {
    int i = 0;
    for (std::string_view c : choices) {
      if (c == word) return i;
      ++i;
    }
    wrong(std::string(name) + " cannot be " + quoted(word));
  }

  int define(std::string_view word, Scale with, int made) {
    const int64_t id = number(word, 0, max_id - 1, "the id");
    const int index = static_cast<int>(p.values.size());
    if (!known.emplace(id, index).second) wrong("value " + std::to_string(id) + " must be made once");
    p.values.push_back({with, index, made, made});
    return index;
  }
  int use(std::string_view word) const {
    const auto found = known.find(number(word));
    if (found == known.end()) wrong("value " + quoted(word) + " must be made on a line before");
    return found->second;
  }

  // One KEY=VALUE; returns the key.
  uint32_t key(std::string_view word, Step& s) {
    const size_t equals = word.find('=');
    if (equals == std::string_view::npos) wrong(quoted(word) + " must be name=value");
    const std::string_view name = word.substr(0, equals), value = word.substr(equals + 1);
    uint32_t bit = 1;
    for (std::string_view k : key_names) {
      if (k == name) break;
      bit <<= 1;
    }
    switch (bit) {
      case weight: s.weight = offset(value, name); break;
      case weight_step: s.weight_step = offset(value, name); break;
      case bias: s.bias = offset(value, name); break;
      case table: s.table = offset(value, name); break;
      case index: s.index = offset(value, name); break;
      case source: s.source = offset(value, name); break;
      case terms: s.terms = number(value, 1, 255, name); break;
      case count: s.count = number(value, 1, INT32_MAX, name); break;
      case bits: s.bits = 2 << choice(value, {"2", "4", "8"}, name); break;
      case n: s.n = number(value, 1, INT32_MAX, name); break;
      case k_groups: s.k_groups = number(value, 1, INT32_MAX, name); break;
      case kernel: s.kernel = pair(value, 0, name); break;
      case stride: s.stride = pair(value, 1, name); break;
      case padding: s.padding = pair(value, 0, name); break;
      case dilation: s.dilation = pair(value, 1, name); break;
      case groups: s.groups = number(value, 1, INT32_MAX, name); break;
      case activation: s.activation = static_cast<Activation>(choice(value, {"none", "relu", "relu6"}, name)); break;
      case layout: s.channels_first = choice(value, {"same", "nchw"}, name); break;
      case mode: s.max = choice(value, {"average", "max"}, name); break;
      case ceil_mode: s.ceil_mode = choice(value, {"0", "1"}, name); break;
      case count_include_pad: s.count_include_pad = choice(value, {"0", "1"}, name); break;
      case shape: s.shape = list(value, -1, name); break;
      case out_scale: s.scale.index = static_cast<int>(number(value, 0, max_id - 1, name)); break;
      case out_bits: s.scale.bits = static_cast<int>(number(value, 2, 8, name)); break;
      case family: s.family = choice(value, {"5opt", "3opt", "2opt", "6opt", "7opt"}, name); break;
      case round: s.round = choice(value, {"0", "1"}, name); break;
      case heads: s.heads = number(value, 1, INT32_MAX, name); break;
      case score_scale: {
        const int32_t bits = static_cast<int32_t>(number(value, 1, 0x7f7fffff, name));  // of a positive float32
        std::memcpy(&s.score_scale, &bits, sizeof bits);
        break;
      }
      case pairs: s.pairs = choice(value, {"0", "1"}, name); break;
      default: wrong(quoted(name) + " is not known");
    }
    return bit;
  }

  // The keys from `at` on; each once, all that are needed and none that is not allowed.
  void keys(const std::vector<std::string_view>& words, size_t at, uint32_t needed, uint32_t optional, Step& s) {
    uint32_t seen = 0;
    for (; at < words.size(); ++at) {
      const uint32_t bit = key(words[at], s);
      if (seen & bit) wrong(quoted(words[at]) + " must be given once");
      if (!((needed | optional) & bit)) wrong(quoted(words[at]) + " does not belong here");
      seen |= bit;
    }
    uint32_t missing = needed & ~seen;
    if (seen & scale) missing |= scale & ~seen;
    for (std::string_view name : key_names) {
      if (missing & 1) wrong(std::string(name) + " must be given");
      missing >>= 1;
    }
    if (!s.scale.codes()) return;
    const size_t index = s.scale.index;
    if (p.scale_bits.size() <= index) p.scale_bits.resize(index + 1);
    int& smallest = p.scale_bits[index];
    smallest = smallest ? std::min(smallest, s.scale.bits) : s.scale.bits;
  }

  void input(const std::vector<std::string_view>& words) {
    demand(words.size() >= 2 && p.steps.empty() && p.outputs.empty(), "inputs must come first, each with an id");
    Step only_scale{};
    keys(words, 2, 0, scale, only_scale);
    const int value = define(words[1], only_scale.scale, -1);
    p.values[value].input = static_cast<int>(p.inputs.size());
    p.inputs.push_back(value);
  }

  void output(const std::vector<std::string_view>& words) {
    demand(words.size() == 3, "an output must have an id and a layout");
    Step only_layout{};
    keys(words, 2, layout, 0, only_layout);
    const int value = use(words[1]);
    Value& root = p.values[p.values[value].root];
    demand(root.input < 0, "an output must be made by a step");
    demand(root.output < 0, "an output must be given once, and share no memory with another");
    root.output = static_cast<int>(p.outputs.size());
    p.outputs.push_back({value, only_layout.channels_first});
  }

  void step(const Signature& signature, const std::vector<std::string_view>& words) {
    demand(p.outputs.empty(), "steps must come before outputs");
    demand(words.size() >= 4 && words[2] == "=", "a step must be: name id = inputs");
    const int index = static_cast<int>(p.steps.size());
    Step s{};
    s.op = signature.op;
    s.where = "network: line " + std::to_string(line) + ", " + std::string(words[0]) + " " + std::string(words[1]);
    size_t at = 3;
    for (; at < words.size() && words[at].find('=') == std::string_view::npos; ++at) s.in.push_back(use(words[at]));
    if (s.in.size() < signature.least || s.in.size() > signature.most)
      wrong(std::string(signature.name) + " takes " + std::to_string(signature.least) + " to " +
            std::to_string(signature.most) + " inputs, not " + std::to_string(s.in.size()));
    keys(words, at, signature.needed, signature.optional, s);
    for (int v : s.in) p.values[p.values[v].root].last = index;
    const Value first = p.values[s.in[0]];
    const bool keeps = s.op == StepOp::reshape || s.op == StepOp::sparq || s.op == StepOp::index_select ||
                       (s.op == StepOp::pool && s.max);
    check_kinds(s, first.scale.codes(), keeps);
    s.out = define(words[1], keeps ? first.scale : s.scale, index);
    if (s.op == StepOp::reshape) p.values[s.out].root = first.root;
    p.steps.push_back(std::move(s));
  }

  // Codes and float32 where they belong.
  void check_kinds(const Step& s, bool codes, bool keeps) const {
    switch (s.op) {
      case StepOp::quantize: demand(!codes, "quantize takes float32 values"); break;
      case StepOp::concat:
      case StepOp::attention:
        for (int v : s.in) demand(p.values[v].scale.codes(), "concat and attention take codes");
        break;
      case StepOp::index_put:
        demand(p.values[s.in[0]].scale == s.scale, "index_put keeps the scale of its first input");
        demand(!p.values[s.in[1]].scale.codes(), "index_put adds float32 values");
        break;
      case StepOp::add: break;
      case StepOp::reshape: {
        int open = 0;
        for (int64_t n : s.shape) open += n == -1;
        demand(s.shape.size() <= 8 && open <= 1, "shape must be 1 to 8 sizes, one of them -1");
        break;
      }
      default: demand(codes, "the first input must be codes");
    }
    if (keeps) demand(!s.scale.codes(), "a step that keeps its input's scale takes no out_scale");
    const bool whole = s.op == StepOp::pool && s.kernel == Pair{0, 0};
    if (s.op == StepOp::conv2d || s.op == StepOp::pool)
      demand(whole || (s.kernel[0] > 0 && s.kernel[1] > 0), "kernel must be positive, or 0,0 for a pool");
    if (s.max) demand(!s.count_include_pad, "count_include_pad must be 0 for max");
  }

  void parse(std::string_view rest) {
    std::vector<std::string_view> words;
    while (!rest.empty()) {
      const size_t end = std::min(rest.find('\n'), rest.size());
      const std::string_view text = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
      ++line;
      if (line == 1) {
        demand(text == "qk-program 1", "the first line must be \"qk-program 1\"");
        continue;
      }
      words.clear();
      for (size_t at = 0; at <= text.size();) {
        const size_t space = std::min(text.find(' ', at), text.size());
        words.push_back(text.substr(at, space - at));
        at = space + 1;
      }
      if (words[0] == "input") {
        input(words);
      } else if (words[0] == "output") {
        output(words);
      } else {
        const Signature* found = nullptr;
        for (const Signature& s : signatures)
          if (s.name == words[0]) found = &s;
        if (!found) wrong(quoted(words[0]) + " is no step");
        step(*found, words);
      }
    }
    demand(!p.inputs.empty() && !p.outputs.empty(), "there must be an input and an output");
  }
};

}  // namespace

std::shared_ptr<const Program> parse_program(const std::string& text) {
  using Entry = std::shared_ptr<const Program>;
  static std::mutex mutex;
  static std::list<Entry> order;                                                  // the one used last in front
  static std::unordered_map<std::string_view, std::list<Entry>::iterator> cache;  // keys lie in the programs
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = cache.find(text);
    if (found != cache.end()) {
      order.splice(order.begin(), order, found->second);
      return order.front();
    }
  }
  const auto program = std::make_shared<Program>();
  program->text = text;
  Parser{*program}.parse(program->text);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(program->text);
  if (found != cache.end()) return *found->second;  // another thread was faster
  order.push_front(program);
  cache.emplace(program->text, order.begin());
  if (order.size() > kept_programs) {
    cache.erase(order.back()->text);
    order.pop_back();
  }
  return program;
}

}  // namespace qk
