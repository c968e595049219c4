// What the faces of prepack, gemm and conv2d check alike.
#pragma once
#include <cstring>
#include <optional>
#include <string>

#include "core/check.h"
#include "core/layout.h"
#include "core/register.h"
#include "core/result.h"
#include "ops/epilogue.h"

namespace qk {

inline void check_size(const char* op, const char* argument, int64_t value, int64_t lowest) {
  check(value >= lowest && value < size_limit, op, argument,
        lowest ? "positive and below 2^31" : "0 or more and below 2^31", value);
}

inline int64_t product(const char* op, const char* what, std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (int64_t size : sizes)
    if (__builtin_mul_overflow(all, size, &all) || all > values_limit)
      fail(op, what, "at most 2^47 values", "more", "Check the sizes.");
  return all;
}

inline const char* name_of(Algorithm algorithm) { return algorithm == Algorithm::winograd ? "winograd" : "direct"; }

// What a weight on the CPU says it was prepacked for; anything but a prepacked weight is direct here and refused below.
inline Algorithm packed_algorithm(const Tensor& weight) {
  PackedHeader h{};
  if (!weight.is_cpu() || weight.scalar_type() != ScalarType::Byte || weight.numel() < 64) return Algorithm::direct;
  std::memcpy(&h, weight.const_data_ptr<uint8_t>(), sizeof h);
  return h.magic == packed_magic && h.algorithm == Algorithm::winograd ? Algorithm::winograd : Algorithm::direct;
}

// What a weight prepacked for Winograd's algorithm can be used for (docs/winograd.md). stride, dilation: pairs.
template <class Pair>
void check_winograd(const char* op, const WeightShape& s, const Pair& stride, const Pair& dilation, int64_t x_bits) {
  const char* advice = "The weight was prepacked for winograd: use algorithm=\"direct\" there.";
  check(s.kh == 3 && s.kw == 3 && s.k_groups == 1 && s.bits <= 4, op, "weight", "of the kernel and bits given",
        "one for winograd", advice);
  check(stride[0] == 1 && stride[1] == 1, op, "stride", "1", "another", advice);
  check(dilation[0] == 1 && dilation[1] == 1, op, "dilation", "1", "another", advice);
  check(x_bits <= 6, op, "x_bits", "at most 6", x_bits, advice);
}

// A prepacked weight has the size and, on the CPU, the header of `shape`.
inline PackedLayout check_prepacked(const char* op, const Tensor& weight, const WeightShape& shape) {
  check_dtype(op, "weight", weight, ScalarType::Byte);
  const PackedLayout layout = QK_DEVICE::packed_layout(shape);
  const auto wanted = [&] {
    std::ostringstream text;
    text << "prepacked from [" << shape.n;
    if (shape.taps() > 1 || shape.groups > 1) text << ", " << shape.kh << ", " << shape.kw;
    text << ", " << shape.c << "] with bits " << shape.bits << ", groups " << shape.groups << " and " << shape.k_groups
         << " steps along K";
    if (shape.algorithm != Algorithm::direct) text << ", for " << name_of(shape.algorithm);
    return text.str();
  };
  const char* advice = "Make it with torch.ops.qk.prepack from the same shape, bits and groups.";
  if (weight.dim() != 1 || weight.numel() != layout.bytes)
    fail(op, "weight", wanted() + " (" + std::to_string(layout.bytes) + " bytes)", describe(weight), advice);
  if (weight.is_cpu()) {
    PackedHeader h;
    std::memcpy(&h, weight.const_data_ptr<uint8_t>(), sizeof h);
    if (h.magic != packed_magic) fail(op, "weight", wanted(), "bytes that prepack did not make", advice);
    if (h.bits != shape.bits || h.n != shape.n || h.kh != shape.kh || h.kw != shape.kw || h.c != shape.c ||
        h.groups != shape.groups || h.k_groups != shape.k_groups || h.algorithm != shape.algorithm) {
      std::ostringstream got;
      got << "one made from [" << h.n << ", " << h.kh << ", " << h.kw << ", " << h.c << "] with bits " << h.bits
          << ", groups " << h.groups << " and " << h.k_groups << " steps along K";
      if (h.algorithm != shape.algorithm) got << ", for " << name_of(h.algorithm);
      fail(op, "weight", wanted(), got.str(), advice);
    }
  }
  return layout;
}

// weight_step [n] or [n, k_groups] with k_groups dividing k. Returns k_groups.
inline int64_t check_weight_step(const char* op, const Tensor& step, int64_t k) {
  check_dtype(op, "weight_step", step, ScalarType::Float);
  const bool fits = (step.dim() == 1 || step.dim() == 2) && step.size(0) >= 1 &&
                    (step.dim() == 1 || (step.size(1) >= 1 && k % step.size(1) == 0));
  if (!fits)
    fail(op, "weight_step", "float32 [N], or [N, groups along K] with groups that divide K = " + std::to_string(k),
         describe(step));
  check_size(op, "weight_step's N", step.size(0), 1);
  product(op, "N times K", {step.size(0), k});
  return step.dim() == 1 ? 1 : step.size(1);
}

// On the CPU codes are looked at only if a code beyond x_bits could make the sum overflow.
inline void check_sum(const char* op, const Tensor& x, int64_t x_bits, const WeightShape& shape) {
  check(shape.group_k() <= longest_k(x_bits, shape.bits), op, "K", "short enough for a sum in int32", shape.group_k(),
        "Use fewer bits, or weight steps by groups along K.");
  if (!x.is_cpu() || shape.group_k() <= longest_k(8, shape.bits)) return;
  const uint8_t* codes = x.const_data_ptr<uint8_t>();
  uint8_t all = 0;
  for (int64_t i = 0, n = x.numel(); i < n; ++i) all |= codes[i];
  check(all <= top_code(x_bits), op, "x", "codes below 2^x_bits", "a larger one", "Give the width of the codes.");
}

// Dense, or none.
inline std::optional<Tensor> check_bias(const char* op, const Tensor& x, const std::optional<Tensor>& bias, int64_t n) {
  if (!bias) return bias;
  check_device(op, x, {{"bias", &*bias}});
  if (bias->scalar_type() != ScalarType::Float || bias->dim() != 1 || bias->size(0) != n)
    fail(op, "bias", "float32 [" + std::to_string(n) + "]", describe(*bias));
  return dense(*bias);
}

// Holds what the pointers of an Epilogue point to.
struct EpilogueTensors {
  Tensor x_step, x_zero, weight_step;
  std::optional<Tensor> bias, out_step, out_zero, residual, residual_step, residual_zero;
  Epilogue epilogue;
};

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  check(name == "relu6", op, "activation", "none, relu or relu6", name);
  return Activation::relu6;
}

// rows: how many rows may have a step of their own; 1 for conv2d.
inline EpilogueTensors check_epilogue(const char* op, const Tensor& x, const Tensor& x_step, const Tensor& x_zero,
                                      int64_t rows, int64_t x_bits, const Tensor& weight_step,
                                      const std::optional<Tensor>& bias, const std::string& activation,
                                      const std::optional<Tensor>& out_step, const std::optional<Tensor>& out_zero,
                                      int64_t out_bits) {
  check_device(op, x, {{"x_step", &x_step}, {"x_zero", &x_zero}, {"weight_step", &weight_step}});
  check(is_fake_quant_width(x_bits), op, "x_bits", "a width from 2 to 8", x_bits);
  check_dtype(op, "x_step", x_step, ScalarType::Float);
  check_dtype(op, "x_zero", x_zero, ScalarType::Int);
  const int64_t steps = x_step.numel();
  if (steps != 1 && steps != rows)
    fail(op, "x_step", rows == 1 ? "one value" : "one value, or one for each of " + std::to_string(rows) + " rows of x",
         describe(x_step));
  if (x_zero.numel() != steps) fail(op, "x_zero", "as many values as x_step, " + describe(x_step), describe(x_zero));
  check(out_step.has_value() == out_zero.has_value(), op, "out_step and out_zero", "given together", "only one");
  EpilogueTensors t{dense(x_step), dense(x_zero), dense(weight_step), {}, out_step, out_zero, {}, {}, {}, {}};
  t.bias = check_bias(op, x, bias, weight_step.size(0));
  Epilogue& e = t.epilogue;
  e.out_bits = 8;
  if (out_step) {
    check_device(op, x, {{"out_step", &*out_step}, {"out_zero", &*out_zero}});
    check_dtype(op, "out_step", *out_step, ScalarType::Float);
    check_dtype(op, "out_zero", *out_zero, ScalarType::Int);
    check_tensor(out_step->numel() == 1, op, "out_step", "one value", *out_step);
    check_tensor(out_zero->numel() == 1, op, "out_zero", "one value", *out_zero);
    check(is_fake_quant_width(out_bits), op, "out_bits", "a width from 2 to 8", out_bits);
    check_step_values(op, "out_step", *out_step);
    check_zero_values(op, "out_zero", *out_zero, out_bits);
    e.out_step = out_step->const_data_ptr<float>();
    e.out_zero = out_zero->const_data_ptr<int32_t>();
    e.out_bits = static_cast<int>(out_bits);
  }
  check_step_values(op, "x_step", t.x_step);
  check_zero_values(op, "x_zero", t.x_zero, x_bits);
  e.x_step = t.x_step.const_data_ptr<float>();
  e.x_zero = t.x_zero.const_data_ptr<int32_t>();
  e.per_row = steps != 1;
  e.x_bits = static_cast<int>(x_bits);
  e.weight_step = t.weight_step.const_data_ptr<float>();
  e.bias = t.bias ? t.bias->const_data_ptr<float>() : nullptr;
  e.activation = parse_activation(op, activation);
  return t;
}

// What is added to the result before the activation, of the shape `sizes` of the result.
inline void check_residual(const char* op, const Tensor& x, const std::vector<int64_t>& sizes,
                           const std::optional<Tensor>& residual, const std::optional<Tensor>& step,
                           const std::optional<Tensor>& zero, EpilogueTensors& t) {
  check(step.has_value() == zero.has_value(), op, "residual_step and residual_zero", "given together", "only one");
  if (!residual) return check(!step, op, "residual_step", "left out without a residual", "one");
  check_device(op, x, {{"residual", &*residual}});
  check_dtype(op, "residual", *residual, step ? ScalarType::Byte : ScalarType::Float);
  bool fits = residual->dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = residual->size(static_cast<int64_t>(i)) == sizes[i];
  if (!fits) {
    std::ostringstream wanted;
    wanted << "of the result's shape [";
    for (size_t i = 0; i < sizes.size(); ++i) wanted << (i ? ", " : "") << sizes[i];
    fail(op, "residual", wanted.str() + "]", describe(*residual));
  }
  t.residual = dense(*residual);
  Epilogue& e = t.epilogue;
  if (!step) {
    e.residual = t.residual->const_data_ptr<float>();
    return;
  }
  check_device(op, x, {{"residual_step", &*step}, {"residual_zero", &*zero}});
  check_dtype(op, "residual_step", *step, ScalarType::Float);
  check_dtype(op, "residual_zero", *zero, ScalarType::Int);
  check_tensor(step->numel() == 1, op, "residual_step", "one value", *step);
  check_tensor(zero->numel() == 1, op, "residual_zero", "one value", *zero);
  check_step_values(op, "residual_step", *step);
  check_zero_values(op, "residual_zero", *zero, 8);
  e.residual = t.residual->const_data_ptr<uint8_t>();
  t.residual_step = step, t.residual_zero = zero;
  e.residual_step = step->const_data_ptr<float>();
  e.residual_zero = zero->const_data_ptr<int32_t>();
}

inline void* result_data(Tensor& out, const Epilogue& e) {
  if (e.out_step) return out.mutable_data_ptr<uint8_t>();
  return out.mutable_data_ptr<float>();
}

}  // namespace qk
