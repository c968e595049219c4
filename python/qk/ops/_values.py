"""What the definitions share whose tensors are float32 values or codes (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import codes


def value(x: Tensor, step: Tensor | None, zero: Tensor | None) -> Tensor:
    """step * (code - zero), one rounded product; x itself without a step."""
    if step is None or zero is None:
        return x
    return (x.float() - zero.float().reshape(())) * step.reshape(())


def result(y: Tensor, activation: str, out_step: Tensor | None, out_zero: Tensor | None, out_bits: int) -> Tensor:
    """The activation of y, then, with out_step, its codes."""
    if activation == "relu":
        y = torch.relu(y)
    elif activation == "relu6":
        y = torch.clamp(y, 0.0, 6.0)
    if out_step is None or out_zero is None:
        return y
    return codes(y, out_step.reshape(1), out_zero.reshape(1), out_bits).to(torch.uint8).reshape(y.shape)
