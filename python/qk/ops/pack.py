"""Codes to bytes at rest (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a packed row: a multiple of 16."""
    return (cols * bits + 127) // 128 * 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Value i of a byte at bit i * bits; rows padded with zero bits to a multiple of 16 bytes.

    codes: [rows, cols], uint8. bits: 2, 4 or 8; codes of 3 bits are stored in 4. Returns [rows, row_bytes(cols, bits)],
    uint8. Raises RuntimeError for another dtype, rank or width, and on the CPU for a code that does not fit, saying
    where; on CUDA such a code loses its high bits.
    """
    return torch.ops.qk.pack(codes, bits)


def reference(codes: Tensor, bits: int) -> Tensor:
    """The definition."""
    rows, cols = codes.shape
    values = codes.new_zeros(rows, row_bytes(cols, bits) * 8 // bits, dtype=torch.int32)
    values[:, :cols] = codes & (2**bits - 1)
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (values.reshape(rows, row_bytes(cols, bits), 8 // bits) << shifts).sum(-1).to(torch.uint8)


@torch.library.register_fake("qk::pack")
def _(codes, bits):
    rows, cols = codes.shape
    return codes.new_empty(rows, row_bytes(cols, bits))
