#include "ops/conv2d.h"

#include <vector>

#include "ops/integer.h"

namespace qk {
namespace {

void check_pair(const char* argument, const std::vector<int64_t>& pair, int64_t lowest) {
  check(pair.size() == 2, "conv2d", argument, "two numbers", pair.size());
  for (int64_t value : pair) check_size("conv2d", argument, value, lowest);
}

int64_t out_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1, padded = size + 2 * pad;
  if (size < 1) fail("conv2d", axis, "1 or more", std::to_string(size));
  if (reach > padded)
    fail("conv2d", axis, "at least as large as the kernel's reach " + std::to_string(reach) + " with padding",
         std::to_string(padded));
  return (padded - reach) / stride + 1;
}

}  // namespace

template <void (*run)(const Conv2dArgs&)>
Tensor conv2d(const Tensor& x, const Tensor& x_step, const Tensor& x_zero, const Tensor& weight,
              const Tensor& weight_step, const std::optional<Tensor>& bias, int64_t bits,
              const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups, int64_t x_bits,
              const std::string& activation, const std::optional<Tensor>& out_step,
              const std::optional<Tensor>& out_zero, int64_t out_bits, const std::optional<Tensor>& residual,
              const std::optional<Tensor>& residual_step, const std::optional<Tensor>& residual_zero) {
  check_device("conv2d", x, {{"weight", &weight}});
  check_dtype("conv2d", "x", x, ScalarType::Byte);
  check_storage_bits("conv2d", bits);
  check_tensor(x.dim() == 4 && x.size(3) >= 1, "conv2d", "x", "codes [B, H, W, C] (NHWC)", x);
  check_pair("kernel", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  check_size("conv2d", "groups", groups, 1);
  const int64_t batch = x.size(0), h = x.size(1), w = x.size(2), channels = x.size(3);
  for (int64_t size : {batch, h, w, channels}) check_size("conv2d", "every size of x", size, 0);
  check(channels % groups == 0, "conv2d", "groups", "a divisor of the channels of x", groups);
  const int64_t k = product("conv2d", "K", {kernel[0], kernel[1], channels / groups});
  check_size("conv2d", "K", k, 1);
  const int64_t k_groups = check_weight_step("conv2d", weight_step, k), n = weight_step.size(0);
  check(n % groups == 0, "conv2d", "groups", "a divisor of the output channels", groups);
  WeightShape shape{n, kernel[0], kernel[1], channels / groups, groups, k_groups, static_cast<int>(bits)};
  const int64_t oh = out_size("H of x", h, kernel[0], stride[0], padding[0], dilation[0]);
  const int64_t ow = out_size("W of x", w, kernel[1], stride[1], padding[1], dilation[1]);
  EpilogueTensors t = check_epilogue("conv2d", x, x_step, x_zero, 1, x_bits, weight_step, bias, activation, out_step,
                                     out_zero, out_bits);
  product("conv2d", "the result", {oh, ow, n, batch ? batch : 1});
  const Tensor xs = dense(x), weights = dense(weight);
  shape.algorithm = packed_algorithm(weights);
  if (shape.algorithm == Algorithm::winograd) check_winograd("conv2d", shape, stride, dilation, x_bits);
  const PackedLayout layout = check_prepacked("conv2d", weights, shape);
  check_sum("conv2d", xs, x_bits, shape);
  check_residual("conv2d", x, {batch, oh, ow, n}, residual, residual_step, residual_zero, t);
  Tensor out = new_values(xs, std::vector<int64_t>{batch, oh, ow, n}, t.epilogue.out_step);
  QK_DEVICE_GUARD(x);
  run({xs.const_data_ptr<uint8_t>(), weights.const_data_ptr<uint8_t>(), result_data(out, t.epilogue), batch, h, w, oh,
       ow, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], shape, layout, t.epilogue});
  return out;
}

QK_REGISTER(m) { m.impl("conv2d", TORCH_BOX(&conv2d<QK_DEVICE::conv2d>)); }

}  // namespace qk
