"""Integer arithmetic of devices without float epilogues, in plain torch: int64 tensors that hold the device's integers.

Sums are exact (in float64, below 2^53), then wrap to the accumulator. These functions are the operators of a realized
graph (qk.hago.realize).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.errors import fail

FRACTION = 31  # bits of a multiplier


def wrap(x: Tensor, bits: int) -> Tensor:
    """x modulo 2^bits, as a signed integer of so many bits has it."""
    half = 1 << (bits - 1)
    return torch.remainder(x + half, 1 << bits) - half


def quantize(x: Tensor, step: Tensor, limit: int) -> Tensor:
    """x [...] float32, step [1] -> clamp(round(x / step), -limit, limit), as qk::quantize rounds."""
    rounded = (x * (1 / step)).round().clamp(-limit, limit).nan_to_num(0)
    return rounded.to(torch.int64).clamp(-limit, limit)  # float32 may have rounded the limit up


def dequantize(x: Tensor, step: Tensor, axis: int) -> Tensor:
    """x [...], step float64 [1] or [channels] along axis -> float32 [...]: the product is rounded once."""
    return (x.double() * along(step, x.dim(), axis)).float()


def fixed_point(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """ratio float64 > 0 -> multiplier and shift, int64: ratio = multiplier / 2^shift, the multiplier below 2^31."""
    mantissa, exponent = torch.frexp(ratio)
    multiplier, shift = (mantissa * 2**FRACTION).round().to(torch.int64), FRACTION - exponent.to(torch.int64)
    full = multiplier == 2**FRACTION  # a mantissa that was rounded up to 1
    multiplier, shift = torch.where(full, multiplier >> 1, multiplier), shift - full.to(torch.int64)
    if bool((shift < 0).any()):
        raise fail("qk.hago", "steps", f"within 2^{FRACTION} of each other", float(ratio.max()))
    beyond = (shift - 62).clamp(0, 62)
    return multiplier >> beyond, shift - beyond


def requantize(x: Tensor, multiplier: Tensor, shift: Tensor, axis: int, limit: int, rounding: str) -> Tensor:
    """x [...] below 2^31 -> clamp(x * multiplier / 2^shift, -limit, limit), rounded as the device does; multiplier and
    shift [1] or [channels] along axis."""
    multiplier, shift = along(multiplier, x.dim(), axis), along(shift, x.dim(), axis)
    return rounded(x * multiplier, shift, rounding).clamp(-limit, limit)


def rounded(product: Tensor, shift: Tensor, rounding: str) -> Tensor:
    """product / 2^shift as an integer. half_up: ties go up; half_away: away from 0; floor: the shift alone."""
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), torch.zeros_like(shift))
    if rounding == "floor":
        return product >> shift
    if rounding == "half_up":
        return (product + half) >> shift
    if rounding == "half_away":
        return product.sign() * ((product.abs() + half) >> shift)
    low = product >> shift
    rest = product - (low << shift)
    up = (rest > half) | ((rest == half) & (low % 2 != 0))
    return low + (up & (shift > 0))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bits: int,
) -> Tensor:
    """x [B, C, H, W], weight [N, C / groups, kh, kw] int8, bias [N] -> [B, N, OH, OW], summed in `bits`."""
    y = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups).to(torch.int64)
    return wrap(y if bias is None else y + bias.view(1, -1, 1, 1), bits)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """x [..., K], weight [N, K] int8, bias [N] -> [..., N]."""
    y = F.linear(x.double(), weight.double()).to(torch.int64)
    return wrap(y if bias is None else y + bias, bits)


def bias_of(bias: Tensor, step: Tensor) -> Tensor:
    """bias [N] float32 in steps of the sums, as int32 holds it."""
    return (bias.double() / step).round().clamp(-(2**31), 2**31 - 1).to(torch.int64)


def add(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """Of one shape and scale."""
    return wrap(a + b, bits)


def clip(x: Tensor, step: Tensor, axis: int) -> Tensor:
    """Between 0 and 6 in steps of `step`."""
    most = (6 / step).round().clamp(max=2**31 - 1).to(torch.int64)
    return torch.minimum(x.clamp(min=0), along(most, x.dim(), axis))


def max_pool(x: Tensor, *window: object) -> Tensor:
    """As torch's."""
    return F.max_pool2d(x.double(), *window).to(torch.int64)


def sum_pool(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], bits: int) -> Tensor:
    """Sums of windows of [B, C, H, W]: an average's integers, whose step is that of x over the window's size."""
    return wrap(window_sums(x.double(), kernel, stride, padding).to(torch.int64), bits)


def window_sums(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Of [B, C, H, W], in its type."""
    return F.avg_pool2d(x, kernel, stride, padding, divisor_override=1)


def along(values: Tensor, dims: int, axis: int) -> Tensor:
    """[1] or [channels] as it meets a tensor of so many axes."""
    if values.numel() == 1:
        return values.reshape(1)
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def power_of_two(step: Tensor) -> Tensor:
    """The next power of two that is not smaller."""
    return torch.exp2(torch.ceil(torch.log2(step.double()))).to(step.dtype)
