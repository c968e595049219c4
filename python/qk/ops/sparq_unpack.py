"""SPARQ values at rest to codes (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops.sparq import check_family
from qk.ops.sparq_pack import BLOCK, shift_bits


def sparq_unpack(packed: Tensor, cols: int, bits: int, stride: int = 1, pairs: bool = True) -> Tensor:
    """The codes that `sparq_pack` was given. packed: [rows, row_bytes], uint8. Returns [rows, cols], uint8.

    Raises RuntimeError for another dtype, rank or family, and cols that such rows do not hold.
    """
    return torch.ops.qk.sparq_unpack(packed, cols, bits, stride, pairs)


def reference(packed: Tensor, cols: int, bits: int, stride: int = 1, pairs: bool = True) -> Tensor:
    """The definition."""
    rows, up = len(packed), shift_bits(bits, stride)
    blocks = packed.int().reshape(rows, -(-cols // BLOCK), 2 * (bits + up) + pairs)
    window, shift = _fields(blocks[..., : 2 * bits], bits), _fields(blocks[..., 2 * bits : 2 * (bits + up)], up)
    values = window << shift * stride
    if pairs:
        split = _fields(blocks[..., -1:], 1).bool().unsqueeze(-1)
        halves, where = window.unflatten(-1, (-1, 2)), shift.unflatten(-1, (-1, 2))
        value = (halves[..., 0] + (halves[..., 1] << bits)) << where[..., 0]
        second = where[..., 1] & 1
        alone = torch.stack([value * (1 - second), value * second], -1)
        values = torch.where(split, alone, values.unflatten(-1, (-1, 2))).flatten(-2)
    return (values & 255).to(torch.uint8).flatten(1)[:, :cols].contiguous()


def _fields(bytes: Tensor, width: int) -> Tensor:
    """The inverse of sparq_pack's _joined."""
    ones = (bytes.unsqueeze(-1) >> torch.arange(8, device=bytes.device) & 1).flatten(-2)
    return (ones.unflatten(-1, (-1, width)) << torch.arange(width, device=bytes.device)).sum(-1).int()


@torch.library.register_fake("qk::sparq_unpack")
def _(packed, cols, bits, stride=1, pairs=True):
    check_family("sparq_unpack", bits, stride)
    rows, _ = packed.shape
    return packed.new_empty(rows, cols)
