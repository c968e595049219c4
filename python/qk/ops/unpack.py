"""Bytes at rest to codes (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The codes that `pack` put into bytes.

    packed: [rows, row_bytes(cols, bits)], uint8. bits: 2, 4 or 8. Returns [rows, cols], uint8.
    Raises RuntimeError for another dtype, rank or width, and for a cols that does not pack into as many bytes.
    """
    return torch.ops.qk.unpack(packed, bits, cols)


def reference(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The definition."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32)
    values = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.reshape(packed.shape[0], packed.shape[1] * (8 // bits))[:, :cols].to(torch.uint8)


@torch.library.register_fake("qk::unpack")
def _(packed, bits, cols):
    rows, _ = packed.shape
    return packed.new_empty(rows, cols)
