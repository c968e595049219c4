// What the faces check alike whose tensors are float32 values or codes.
#pragma once
#include <optional>
#include <string>

#include "core/check.h"
#include "core/register.h"
#include "core/result.h"
#include "ops/integer.h"
#include "ops/values.h"

namespace qk {

// Holds what the pointers of an Operand point to.
struct OperandTensors {
  Tensor data;
  std::optional<Tensor> step, zero;
  Operand operand;
};

inline void check_one_step(const char* op, const Tensor& first, const std::string& name, const Tensor& step,
                           const Tensor& zero, int64_t bits) {
  const std::string step_name = name + "_step", zero_name = name + "_zero";
  check_device(op, first, {{step_name.c_str(), &step}, {zero_name.c_str(), &zero}});
  check_dtype(op, step_name.c_str(), step, ScalarType::Float);
  check_dtype(op, zero_name.c_str(), zero, ScalarType::Int);
  check_tensor(step.numel() == 1, op, step_name.c_str(), "one value", step);
  check_tensor(zero.numel() == 1, op, zero_name.c_str(), "one value", zero);
  check_step_values(op, step_name.c_str(), step);
  check_zero_values(op, zero_name.c_str(), zero, bits);
}

inline void check_together(const char* op, const std::string& name, const std::optional<Tensor>& step,
                           const std::optional<Tensor>& zero) {
  if (step.has_value() != zero.has_value())
    fail(op, (name + "_step and " + name + "_zero").c_str(), "given together", "only one");
}

// Codes with step and zero, or float32 without.
inline OperandTensors check_operand(const char* op, const Tensor& first, const char* name, const Tensor& x,
                                    const std::optional<Tensor>& step, const std::optional<Tensor>& zero) {
  check_device(op, first, {{name, &x}});
  check_together(op, name, step, zero);
  check_tensor(x.scalar_type() == (step ? ScalarType::Byte : ScalarType::Float), op, name,
               step ? "uint8 codes, as it has a step" : "float32, as it has no step", x);
  if (step) check_one_step(op, first, name, *step, *zero, 8);
  OperandTensors t{dense(x), step, zero, {}};
  t.operand.data = step ? static_cast<const void*>(t.data.const_data_ptr<uint8_t>()) : t.data.const_data_ptr<float>();
  t.operand.step = step ? step->const_data_ptr<float>() : nullptr;
  t.operand.zero = zero ? zero->const_data_ptr<int32_t>() : nullptr;
  return t;
}

// All of a result but its memory.
inline Result check_result(const char* op, const Tensor& first, const std::string& activation,
                           const std::optional<Tensor>& step, const std::optional<Tensor>& zero, int64_t bits) {
  check_together(op, "out", step, zero);
  check(is_fake_quant_width(bits), op, "out_bits", "a width from 2 to 8", bits);
  if (step) check_one_step(op, first, "out", *step, *zero, bits);
  return {nullptr, parse_activation(op, activation), step ? step->const_data_ptr<float>() : nullptr,
          zero ? zero->const_data_ptr<int32_t>() : nullptr, static_cast<int>(bits)};
}

// Sets where the result lies.
template <class Sizes>
Tensor new_result(const Tensor& like, const Sizes& sizes, Result& result) {
  Tensor out = new_values(like, sizes, result.step);
  result.data = result.step ? static_cast<void*>(out.mutable_data_ptr<uint8_t>()) : out.mutable_data_ptr<float>();
  return out;
}

}  // namespace qk
