"""Float values to codes, with a given step and zero."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import codes as _codes
from qk.ops._rows import on_one_device


def quantize(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """clamp(round(x / step) + zero, 0, 2^bits - 1), where x / step is x times the once-rounded 1 / step.

    x: [...], float32. step: float32, positive and finite, and zero: int32, from 0 to 2^bits - 1; one value each, or one
    for each row of x seen as [step.numel(), -1]. bits: 2 to 8.
    Returns uint8 codes of x's shape, contiguous. Ties go to the even integer, +-Inf to the ends, NaN to zero.
    With one step, an NCHW tensor permuted to NHWC is read as it lies; other strides are copied first.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.quantize(x, step, zero, bits)


def reference(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The definition."""
    return _codes(x, step, zero, bits).to(torch.uint8).reshape(x.shape)


@torch.library.register_fake("qk::quantize")
def _(x, step, zero, bits):
    on_one_device("quantize", x, step, zero)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)
