"""The grid mid-rise: 2^bits levels at odd multiples of half a step on both sides of 0, which is none of them.

Codes count half steps, so that the kernels' u - zero is the odd integer itself: one bit more than the width, and 8
bits for 4, whose zero is 128 as of every 8-bit weight. `step` is half a step of the grid.
Source: released code of Nahshan et al., Loss Aware Post-training Quantization (2019).
"""

from __future__ import annotations

import torch
from torch import Tensor


def middle(bits: int) -> int:
    """The code of 0, which is no level's: those are at an odd distance from it."""
    return 128 if bits == 4 else 2**bits - 1


def codes_of(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """uint8 of x's shape. step: one, or one for each row of x seen as [step.numel(), -1]. Ties go to the even level,
    counted from the lowest."""
    top = 2**bits - 1
    rows, step = x.reshape(step.numel(), -1), step.reshape(-1, 1)
    level = torch.round((rows + step * top) / (2 * step)).clamp(0, top)  # in this order, as there: it decides ties
    return (2 * level - top + middle(bits)).to(torch.uint8).reshape(x.shape)
