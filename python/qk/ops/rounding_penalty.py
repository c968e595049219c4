"""How far learned roundings are from a decision.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020), section 3.3, f_reg.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device, widened
from qk.ops.soft_round import fraction, penalty_slope


def rounding_penalty(v: Tensor, beta: float) -> Tensor:
    """Sum of 1 - |2 h(v) - 1|^beta over all values, with a gradient for v; 0 once every h is 0 or 1.

    v: [...], float32, float16 or bfloat16. beta: at least 1; a large one leaves the undecided middle flat. h as in
    `soft_round`.
    Returns one value, [], float32. The same bits for every number of threads and instruction set. Raises
    RuntimeError for another dtype or beta.
    """
    return torch.ops.qk.rounding_penalty(v, beta)


def reference(v: Tensor, beta: float) -> Tensor:
    """The definition, in the dtype of v, float32 at least."""
    return (1 - (2 * fraction(widened(v)) - 1).abs().pow(beta)).sum()


def reference_backward(grad: Tensor, v: Tensor, beta: float) -> Tensor:
    """The definition of the gradient of v."""
    return (grad * penalty_slope(widened(v), beta)).to(v.dtype)


@torch.library.register_fake("qk::rounding_penalty")
def _(v, beta):
    return v.new_empty((), dtype=torch.float32)


@torch.library.register_fake("qk::rounding_penalty_backward")
def _(grad, v, beta):
    on_one_device("rounding_penalty_backward", grad, v)
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    v, ctx.beta = inputs
    ctx.save_for_backward(v)


def _backward(ctx, grad):
    return torch.ops.qk.rounding_penalty_backward(grad, *ctx.saved_tensors, ctx.beta), None


torch.library.register_autograd("qk::rounding_penalty", _backward, setup_context=_save)
