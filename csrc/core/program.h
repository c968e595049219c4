// Programs of the operator network: text to steps (python/qk/ops/_program.py is the grammar). Parsed once, then cached.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/epilogue.h"

namespace qk {

enum class StepOp {
  quantize,
  conv2d,
  gemm,
  add,
  multiply,
  pool,
  lookup,
  sparq,
  concat,
  attention,
  index_put,
  index_select,
  reshape,
  dequantize
};

// Of codes: which step and zero, and the width. bits 0: float32, no scale.
struct Scale {
  int index = 0, bits = 0;
  bool codes() const { return bits != 0; }
  bool operator==(const Scale& other) const { return index == other.index && bits == other.bits; }
};

using Pair = std::array<int64_t, 2>;

struct Step {
  StepOp op;
  std::string where;    // for errors: "network: line 4, conv2d 2"
  int out = 0;          // index into Program::values
  std::vector<int> in;  // the same
  Scale scale;          // what the result is quantized with; none for what keeps the input's
  int64_t weight = -1, weight_step = -1, bias = -1, table = -1,  // offsets into the constants,
      index = -1, source = -1;                                   // -1: none
  int bits = 0;                                                  // of the weight
  int64_t n = 0, k_groups = 1;
  Pair kernel{}, stride{1, 1}, padding{}, dilation{1, 1};
  int64_t groups = 1;
  Activation activation = Activation::none;
  bool channels_first = false;  // quantize's input
  bool max = false, ceil_mode = false, count_include_pad = false;
  int family = 0;  // of sparq: which of program.cpp's list
  bool round = false, pairs = false;
  int64_t heads = 0;
  int64_t count = 0, terms = 0;  // of index and source
  float score_scale = 0.0f;
  std::vector<int64_t> shape;
};

struct Value {
  Scale scale;
  int root;         // the value whose memory this one is: itself, or what reshape was given
  int made;         // step, -1 for an input
  int last;         // of a root: the last step that reads it or a value that lies in it
  int input = -1;   // of a root: which tensor it is
  int output = -1;  // of a root: which result it is
};

struct ProgramOutput {
  int value;
  bool channels_first;
};

struct Program {
  std::string text;
  std::vector<Value> values;
  std::vector<int> inputs;  // values
  std::vector<Step> steps;
  std::vector<ProgramOutput> outputs;
  std::vector<int> scale_bits;  // by index: the smallest width that it is used with, 0: not at all
};

// Throws std::runtime_error that names the line. The same text gives the same object as long as it is among the last
// that were asked for; safe from many threads.
std::shared_ptr<const Program> parse_program(const std::string& text);

}  // namespace qk
