#include "ops/pool.h"

#include <vector>

#include "ops/values_check.h"

namespace qk {
namespace {

void check_pair(const char* argument, const std::vector<int64_t>& pair, int64_t lowest) {
  check(pair.size() == 2, "pool", argument, "two numbers", pair.size());
  for (int64_t value : pair) check_size("pool", argument, value, lowest);
}

// As torch's pools: with ceil_mode a last window may hang over the padded end, if it begins before that of x.
int64_t out_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                 bool ceil_mode) {
  const int64_t reach = dilation * (kernel - 1) + 1, padded = size + 2 * pad;
  check(size >= 1, "pool", axis, "1 or more", size);
  if (2 * pad > kernel)
    fail("pool", "padding", "at most half of the kernel, " + std::to_string(kernel), std::to_string(pad));
  const int64_t room = padded - reach + (ceil_mode ? stride - 1 : 0);
  if (room < 0)
    fail("pool", axis, "at least as large as the kernel's reach " + std::to_string(reach) + " with padding",
         std::to_string(padded));
  const int64_t out = room / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + pad ? out - 1 : out;
}

PoolMode parse_mode(const std::string& name) {
  if (name == "max") return PoolMode::max;
  check(name == "average", "pool", "mode", "max or average", name);
  return PoolMode::average;
}

}  // namespace

template <void (*run)(const PoolArgs&)>
Tensor pool(const Tensor& x, const Tensor& x_step, const Tensor& x_zero, const std::string& mode_name,
            const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, bool ceil_mode, bool count_include_pad,
            std::optional<int64_t> divisor_override, const std::string& activation,
            const std::optional<Tensor>& out_step, const std::optional<Tensor>& out_zero, int64_t out_bits) {
  const PoolMode mode = parse_mode(mode_name);
  check_tensor(x.dim() == 4 && x.scalar_type() == ScalarType::Byte, "pool", "x", "uint8 codes [B, H, W, C] (NHWC)", x);
  const OperandTensors xs = check_operand("pool", x, "x", x, x_step, x_zero);
  check_pair("kernel", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  const int64_t images = x.size(0), h = x.size(1), w = x.size(2), channels = x.size(3);
  for (int64_t size : {images, h, w, channels}) check_size("pool", "every size of x", size, 0);
  Result result = check_result("pool", x, activation, out_step, out_zero, out_bits);
  if (mode == PoolMode::max) {
    check(!result.step, "pool", "out_step", "left out for mode max", "one", "The result has the step of x.");
    check(result.activation == Activation::none, "pool", "activation", "none for mode max", activation);
    check(!divisor_override, "pool", "divisor_override", "left out for mode max", "one");
  } else {
    check(dilation[0] == 1 && dilation[1] == 1, "pool", "dilation", "1 for mode average", "another");
    if (divisor_override) check_size("pool", "divisor_override", *divisor_override, 1);
  }
  const int64_t oh = out_size("H of x", h, kernel[0], stride[0], padding[0], dilation[0], ceil_mode);
  const int64_t ow = out_size("W of x", w, kernel[1], stride[1], padding[1], dilation[1], ceil_mode);
  constexpr int64_t longest = INT32_MAX / 255;
  if (mode == PoolMode::average) {
    const int64_t inside = (kernel[0] < h ? kernel[0] : h) * (kernel[1] < w ? kernel[1] : w);
    check(inside <= longest, "pool", "the window", "of at most 2^23 positions for a sum in int32", inside);
  }
  product("pool", "the result", {oh, ow, channels ? channels : 1, images ? images : 1});
  const std::vector<int64_t> sizes{images, oh, ow, channels};
  Tensor out;
  if (mode == PoolMode::max) {
    out = torch::stable::new_empty(x, sizes, ScalarType::Byte);
    result.data = out.mutable_data_ptr<uint8_t>();
  } else {
    out = new_result(x, sizes, result);
  }
  QK_DEVICE_GUARD(x);
  run({xs.operand, result, mode, images, h, w, channels, oh, ow, kernel[0], kernel[1], stride[0], stride[1], padding[0],
       padding[1], dilation[0], dilation[1], count_include_pad, divisor_override ? *divisor_override : 0});
  return out;
}

QK_REGISTER(m) { m.impl("pool", TORCH_BOX(&pool<QK_DEVICE::pool>)); }

}  // namespace qk
