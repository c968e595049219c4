"""Sum of two tensors of codes or values: what a skip connection needs."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._epilogue import result_dtype
from qk.ops._rows import on_one_device
from qk.ops._values import result, value


def add(
    a: Tensor,
    a_step: Tensor | None,
    a_zero: Tensor | None,
    b: Tensor,
    b_step: Tensor | None,
    b_zero: Tensor | None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """activation(value(a) + value(b)), then, with out_step, quantized.

    a, b: [...] of one shape: uint8 codes with a step (float32) and a zero (int32) of one value each, which stand for
    step * (code - zero), or float32 without. activation: none, relu, relu6. out_step: float32 and out_zero: int32, one
    value each, for a result in codes of out_bits (2 to 8).
    Returns the shape of a, contiguous; float32, or uint8 with out_step.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.add(a, a_step, a_zero, b, b_step, b_zero, activation, out_step, out_zero, out_bits)


def reference(
    a: Tensor,
    a_step: Tensor | None,
    a_zero: Tensor | None,
    b: Tensor,
    b_step: Tensor | None,
    b_zero: Tensor | None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """The definition."""
    y = value(a, a_step, a_zero) + value(b, b_step, b_zero)
    return result(y, activation, out_step, out_zero, out_bits)


@torch.library.register_fake("qk::add")
def _(a, a_step, a_zero, b, b_step, b_zero, activation="none", out_step=None, out_zero=None, out_bits=8):
    on_one_device("add", a, a_step, a_zero, b, b_step, b_zero, out_step, out_zero)
    return torch.empty(a.shape, dtype=result_dtype(out_step), device=a.device)
