"""Fake quantization with a learned step.

Source: Esser et al., Learned Step Size Quantization (2020), section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import as_rows, fake_quantize, on_one_device, units, widened


def lsq(x: Tensor, step: Tensor, zero: Tensor, bits: int, grad_scale: float = 1.0, boundary: str = "paper") -> Tensor:
    """step * (clamp(round(x / step) + zero, 0, 2^bits - 1) - zero), with gradients for x and step.

    x: [...], float32, float16 or bfloat16. step: float32, positive, and zero: int32, one value each (per tensor) or
    one for each row of x seen as [step.numel(), -1]. bits: 2 to 8. With the paper's limits: zero = Q_N, 2^bits - 1
    - zero = Q_P. grad_scale multiplies the gradient of step; the paper's is 1 / sqrt(N * Q_P) (`grad_scale_for`).
    boundary: "paper" lets x's gradient pass strictly inside the limits; "torch" decides on the rounded code, as
    torch's own learnable fake-quantize does.
    Returns a tensor like x, computed in float32. Raises RuntimeError for another dtype, device, shape, or a step
    that is not positive.
    """
    return torch.ops.qk.lsq(x, step, zero, bits, grad_scale, boundary)


def grad_scale_for(values: int, top: int) -> float:
    """The paper's g = 1 / sqrt(N * Q_P) (section 2.2). values: N, weights of the layer or features of one sample."""
    return (values * top) ** -0.5


def reference(
    x: Tensor, step: Tensor, zero: Tensor, bits: int, grad_scale: float = 1.0, boundary: str = "paper"
) -> Tensor:
    """The definition."""
    return fake_quantize(widened(x), step, zero, bits).to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, step: Tensor, zero: Tensor, bits: int, grad_scale: float = 1.0, boundary: str = "paper"
) -> tuple[Tensor, Tensor]:
    """The definition of the gradients of x and step; the sum over a row is in float64."""
    t = units(widened(x), step)
    low = -zero.reshape(-1, 1).to(torch.float32)
    high = low + (2**bits - 1)
    code = torch.minimum(torch.maximum(torch.round(t), low), high)
    if boundary == "paper":
        inside = (low < t) & (t < high)
    else:
        inside = (low <= torch.round(t)) & (torch.round(t) <= high)
    slope = torch.where(inside, code - t, torch.nan_to_num(code))
    grads = as_rows(widened(grad), step)
    grad_step = (grads.double() * slope.double()).sum(1).float() * grad_scale
    return torch.where(inside, grads, 0.0).reshape(x.shape).to(x.dtype), grad_step.reshape(step.shape)


@torch.library.register_fake("qk::lsq")
def _(x, step, zero, bits, grad_scale=1.0, boundary="paper"):
    on_one_device("lsq", x, step, zero)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("qk::lsq_backward")
def _(grad, x, step, zero, bits, grad_scale, boundary):
    on_one_device("lsq_backward", grad, x, step, zero)
    contiguous = torch.contiguous_format
    return torch.empty_like(x, memory_format=contiguous), torch.empty_like(step, memory_format=contiguous)


def _save(ctx, inputs, output):
    x, step, zero, ctx.bits, ctx.grad_scale, ctx.boundary = inputs
    ctx.save_for_backward(x, step, zero)


def _backward(ctx, grad):
    grads = torch.ops.qk.lsq_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.grad_scale, ctx.boundary)
    return *grads, None, None, None, None


torch.library.register_autograd("qk::lsq", _backward, setup_context=_save)
