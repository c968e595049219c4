"""What the benchmarks of the integer operators share: weights, and the peak of products as the limit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qk import _core


def weight(n: int, k: int, bits: int, k_groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes [N, K], their zeros and steps."""
    per = (n,) if k_groups == 1 else (n, k_groups)
    zero = torch.full(per, 2 ** (bits - 1), dtype=torch.int32)
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), zero, 0.01 + torch.rand(per)


def at_peak(operations: int) -> Callable[[], object]:
    """As many operations on registers alone, on one thread: the limit of a product with one thread."""
    rounds = max(1, round(operations / _core.probe_products(1)))
    return lambda: _core.probe_products(rounds)
