"""Codes to the float values that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import as_rows, on_one_device


def dequantize(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """step * (codes - zero): exact differences, one rounded product.

    codes: [...], uint8. step: float32, positive and finite, and zero: int32, from 0 to 255; one value each, or one for
    each row of codes seen as [step.numel(), -1]. Returns float32 of the shape of codes, contiguous.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.dequantize(codes, step, zero)


def reference(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The definition."""
    units = as_rows(codes, step).float() - zero.reshape(-1, 1).float()
    return (units * step.reshape(-1, 1)).reshape(codes.shape)


@torch.library.register_fake("qk::dequantize")
def _(codes, step, zero):
    on_one_device("dequantize", codes, step, zero)
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
