// Errors of the faces: "qk::operator: argument must be X, got Y. What to do."
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/bits.h"
#include "core/halves.h"

namespace qk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected, const std::string& got,
                              const char* advice = "") {
  throw std::runtime_error(std::string("qk::") + op + ": " + argument + " must be " + expected + ", got " + got + "." +
                           (*advice ? " " : "") + advice);
}

// A string is built only for an error, so a check that holds costs one comparison.
template <class Got>
inline void check(bool holds, const char* op, const char* argument, const char* expected, const Got& got,
                  const char* advice = "") {
  if (holds) return;
  std::ostringstream text;
  text << std::boolalpha << got;
  fail(op, argument, expected, text.str(), advice);
}

inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " [";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline void check_tensor(bool holds, const char* op, const char* argument, const char* expected, const Tensor& got,
                         const char* advice = "") {
  if (!holds) fail(op, argument, expected, describe(got), advice);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype) fail(op, argument, torch::headeronly::toString(dtype), describe(t));
}

inline FloatType check_float(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FloatType::float32;
    case ScalarType::Half: return FloatType::float16;
    case ScalarType::BFloat16: return FloatType::bfloat16;
    default: fail(op, argument, "float32, float16 or bfloat16", describe(t));
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// The gradient of a sum.
inline void check_scalar(const char* op, const char* argument, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || t.numel() != 1) fail(op, argument, "one float32 value", describe(t));
}

inline void check_same_shape(const char* op, const char* argument, const Tensor& t, const char* other_name,
                             const Tensor& other) {
  if (!same_shape(t, other))
    fail(op, argument, "of the shape of " + std::string(other_name) + ", " + describe(other), describe(t));
}

// As well as of its type.
inline void check_like(const char* op, const char* argument, const Tensor& t, const char* other_name,
                       const Tensor& other) {
  if (t.scalar_type() != other.scalar_type())
    fail(op, argument, "of the type of " + std::string(other_name) + ", " + describe(other), describe(t));
  check_same_shape(op, argument, t, other_name, other);
}

// Every tensor of a call lies on the device of the first one; the dispatcher only looks at one of them.
inline void check_device(const char* op, const Tensor& first,
                         std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  for (const auto& [name, t] : others)
    if (t->device() != first.device())
      fail(op, name, "on the device of the first tensor", "a tensor on another device",
           "Move all tensors to one device.");
}

inline void check_bits(const char* op, int64_t bits) {
  check(is_fake_quant_width(bits), op, "bits", "a width from 2 to 8", bits);
}

inline void check_storage_bits(const char* op, int64_t bits) {
  check(is_storage_width(bits), op, "bits", "2, 4 or 8", bits, "3-bit codes are stored in 4.");
}

// Kernels take numbers as float32.
inline bool finite_float(double number) { return std::isfinite(static_cast<float>(number)); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// On the CPU the values themselves are checked: a step of 0 or NaN would make every code meaningless.
// On CUDA that would wait for the device, so the kernels only promise not to crash.
inline void check_step_values(const char* op, const char* argument, const Tensor& step) {
  if (!step.is_cpu()) return;
  const float* s = step.const_data_ptr<float>();
  for (int64_t i = 0, n = step.numel(); i < n; ++i)
    if (!(s[i] > 0) || std::isinf(s[i]))
      fail(op, argument, "positive and finite", std::to_string(s[i]) + " at " + std::to_string(i),
           "Calibrate again on data without NaN, Inf or all-zero ranges.");
}

inline void check_zero_values(const char* op, const char* argument, const Tensor& zero, int64_t bits) {
  if (!zero.is_cpu()) return;
  const int32_t* z = zero.const_data_ptr<int32_t>();
  const int32_t top = top_code(bits);
  for (int64_t i = 0, n = zero.numel(); i < n; ++i)
    if (z[i] < 0 || z[i] > top)
      fail(op, argument, "a code from 0 to " + std::to_string(top), std::to_string(z[i]) + " at " + std::to_string(i));
}

// A tensor is seen as [rows, numel / rows], one step and zero for each row (docs/numerics.md).
struct Rows {
  int64_t rows, cols;
  Tensor step, zero;  // dense
};

inline Rows check_rows(const char* op, const Tensor& x, const Tensor& step, const Tensor& zero, int64_t bits,
                       const char* name = "x") {
  check_dtype(op, "step", step, ScalarType::Float);
  check_dtype(op, "zero", zero, ScalarType::Int);
  const int64_t rows = step.numel();
  if (rows < 1 || (x.numel() % rows) != 0)
    fail(op, "step", std::string("one value, or one for each row of ") + name + " seen as [step.numel(), -1]",
         describe(step) + " for " + name + " " + describe(x));
  if (zero.numel() != rows) fail(op, "zero", "one value for each step, " + describe(step), describe(zero));
  Rows r{rows, x.numel() / rows, dense(step), dense(zero)};
  check_step_values(op, "step", r.step);
  check_zero_values(op, "zero", r.zero, bits);
  return r;
}

}  // namespace qk
