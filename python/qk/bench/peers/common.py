"""What several peers need."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(w: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] as signed codes of `bits` with a step for each block along K: codes [N, K / block, block] int8, steps
    [N, K / block, 1], and the values that they stand for [N, K]."""
    n, k = w.shape
    parts = w.reshape(n, k // block, block)
    half = 2 ** (bits - 1)
    step = parts.abs().amax(2, keepdim=True) / max(half - 1, 1)
    codes = (parts / step).round().clamp(-half, half - 1)
    return codes.to(torch.int8), step, (codes * step).reshape(n, k)
