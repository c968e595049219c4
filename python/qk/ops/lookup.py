"""A value for each code, from a table."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """table[code]: any function of one quantized variable, such as another step or hard-swish.

    codes: [...], uint8. table: [256], uint8 (codes to codes) or float32 (codes to values); every code needs an entry.
    Returns the shape of codes, contiguous, with the table's dtype.
    Raises RuntimeError for another dtype, device or shape.
    """
    return torch.ops.qk.lookup(codes, table)


def reference(codes: Tensor, table: Tensor) -> Tensor:
    """The definition."""
    return table[codes.long()]


@torch.library.register_fake("qk::lookup")
def _(codes, table):
    on_one_device("lookup", codes, table)
    return torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
