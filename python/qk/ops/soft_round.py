"""Weights whose rounding is learned: floor(weight / step) plus a learned fraction.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import as_rows, on_one_device, units, widened

LOW, HIGH = -0.1, 1.1  # the paper's gamma and zeta: they let the sigmoid reach 0 and 1


def soft_round(weight: Tensor, v: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """step * (clamp(floor(weight / step) + h(v) + zero, 0, 2^bits - 1) - zero), with a gradient for v.

    weight, v: [...], both float32, float16 or bfloat16. step: float32, positive, and zero: int32, one value each
    (per tensor) or one for each row of weight seen as [step.numel(), -1]. bits: 2 to 8. h is `fraction`.
    Returns a tensor like weight, computed in float32. NaN in weight or v stays NaN. Raises RuntimeError for another
    dtype, device, shape, or a step that is not positive.
    """
    return torch.ops.qk.soft_round(weight, v, step, zero, bits)


def fraction(v: Tensor) -> Tensor:
    """h(V): the part in [0, 1] to add to floor(weight / step)."""
    return torch.clamp(torch.sigmoid(v) * (HIGH - LOW) + LOW, 0, 1)


def start(weight: Tensor, step: Tensor) -> Tensor:
    """The v at which learning starts: h(v) is the fraction of weight / step, so nothing has moved yet."""
    t = units(weight, step)
    return torch.logit((t - torch.floor(t) - LOW) / (HIGH - LOW)).reshape(weight.shape)


def reference(weight: Tensor, v: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The definition; autograd of it is the definition of the gradient."""
    low = -zero.reshape(-1, 1).to(torch.float32)
    code = torch.floor(units(widened(weight), step)) + fraction(as_rows(widened(v), step))
    values = torch.clamp(code, low, low + (2**bits - 1)) * step.reshape(-1, 1)
    return values.reshape(weight.shape).to(weight.dtype)


def reference_backward(
    grad: Tensor,
    weight: Tensor,
    v: Tensor,
    step: Tensor,
    zero: Tensor,
    bits: int,
    penalty: Tensor | None = None,
) -> Tensor:
    """The definition of the gradient of v, with that of penalty[0] * rounding_penalty(v, beta=penalty[1]) added."""
    low = -zero.reshape(-1, 1).to(torch.float32)
    rows = as_rows(widened(v), step)
    code = torch.floor(units(widened(weight), step)) + fraction(rows)
    inside = (code >= low) & (code <= low + (2**bits - 1))
    grads = as_rows(widened(grad), step) * step.reshape(-1, 1) * slope_of(rows)
    found = torch.where(inside, grads, 0.0).reshape(v.shape)
    if penalty is not None:
        found = found + penalty[0] * penalty_slope(widened(v), penalty[1])
    return found.to(v.dtype)


def slope_of(v: Tensor) -> Tensor:
    """dh/dv, 0 where h is clamped."""
    sigmoid = torch.sigmoid(v)
    h = sigmoid * (HIGH - LOW) + LOW
    return torch.where((h > 0) & (h < 1), (HIGH - LOW) * sigmoid * (1 - sigmoid), 0.0)


def penalty_slope(v: Tensor, beta: float | Tensor) -> Tensor:
    """d/dv (1 - |2 h(v) - 1|^beta)."""
    u = 2 * fraction(v) - 1
    return -beta * u.abs().pow(beta - 1) * u.sign() * 2 * slope_of(v)


@torch.library.register_fake("qk::soft_round")
def _(weight, v, step, zero, bits):
    on_one_device("soft_round", weight, v, step, zero)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("qk::soft_round_backward")
def _(grad, weight, v, step, zero, bits, penalty=None):
    on_one_device("soft_round_backward", grad, weight, v, step, zero, *([] if penalty is None else [penalty]))
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    weight, v, step, zero, ctx.bits = inputs
    ctx.save_for_backward(weight, v, step, zero)


def _backward(ctx, grad):
    return None, torch.ops.qk.soft_round_backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None


torch.library.register_autograd("qk::soft_round", _backward, setup_context=_save)
