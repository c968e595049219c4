"""Tensors of codes side by side, brought to one step."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device
from qk.ops._values import result, value


def concat(
    codes: list[Tensor],
    steps: list[Tensor],
    zeros: list[Tensor],
    out_step: Tensor,
    out_zero: Tensor,
    out_bits: int = 8,
) -> Tensor:
    """The values step * (code - zero) of all tensors, joined along the last axis (channels of NHWC) and quantized.

    codes: uint8 [..., C] each, alike but for C. steps: float32 and zeros: int32, one value each for each tensor.
    out_step: float32 and out_zero: int32, one value each. out_bits: 2 to 8. Codes of the result's own step and zero are
    copied. One tensor is brought to another step.
    Returns uint8 [..., sum of C], contiguous.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.concat(codes, steps, zeros, out_step, out_zero, out_bits)


def reference(
    codes: list[Tensor],
    steps: list[Tensor],
    zeros: list[Tensor],
    out_step: Tensor,
    out_zero: Tensor,
    out_bits: int = 8,
) -> Tensor:
    """The definition."""
    values = [value(*part) for part in zip(codes, steps, zeros, strict=True)]
    return result(torch.cat(values, -1), "none", out_step, out_zero, out_bits)


@torch.library.register_fake("qk::concat")
def _(codes, steps, zeros, out_step, out_zero, out_bits=8):
    on_one_device("concat", *codes, *steps, *zeros, out_step, out_zero)
    channels = sum(part.shape[-1] for part in codes)
    return torch.empty((*codes[0].shape[:-1], channels), dtype=torch.uint8, device=codes[0].device)
