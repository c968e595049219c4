"""Product of an image with one value for each of its channels: what a squeeze-and-excitation block needs."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._epilogue import result_dtype
from qk.ops._rows import on_one_device
from qk.ops._values import result, value


def multiply(
    x: Tensor,
    x_step: Tensor | None,
    x_zero: Tensor | None,
    gate: Tensor,
    gate_step: Tensor | None,
    gate_zero: Tensor | None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """activation(value(x) * value(gate)), then, with out_step, quantized.

    x: [B, ..., C] and gate: [B, 1, ..., C], as many axes: each uint8 codes with a step (float32) and a zero (int32) of
    one value each, which stand for step * (code - zero), or float32 without. The rest as in `add`.
    Returns the shape of x, contiguous; float32, or uint8 with out_step.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.multiply(
        x, x_step, x_zero, gate, gate_step, gate_zero, activation, out_step, out_zero, out_bits
    )


def reference(
    x: Tensor,
    x_step: Tensor | None,
    x_zero: Tensor | None,
    gate: Tensor,
    gate_step: Tensor | None,
    gate_zero: Tensor | None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """The definition."""
    y = value(x, x_step, x_zero) * value(gate, gate_step, gate_zero)
    return result(y, activation, out_step, out_zero, out_bits)


@torch.library.register_fake("qk::multiply")
def _(x, x_step, x_zero, gate, gate_step, gate_zero, activation="none", out_step=None, out_zero=None, out_bits=8):
    on_one_device("multiply", x, x_step, x_zero, gate, gate_step, gate_zero, out_step, out_zero)
    return torch.empty(x.shape, dtype=result_dtype(out_step), device=x.device)
