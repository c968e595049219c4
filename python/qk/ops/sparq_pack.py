"""SPARQ values to bytes at rest (docs/format.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.ops.sparq import check_family

BLOCK = 16  # values


def shift_bits(bits: int, stride: int) -> int:
    """Bits that name one of a family's shifts."""
    return ((8 - bits) // stride).bit_length()


def row_bytes(cols: int, bits: int, stride: int = 1, pairs: bool = True) -> int:
    """Bytes of a packed row."""
    return -(-cols // BLOCK) * (2 * (bits + shift_bits(bits, stride)) + pairs)


def sparq_pack(codes: Tensor, bits: int, stride: int = 1, pairs: bool = True) -> Tensor:
    """Windows, shifts and, with pairs, which pairs give all of their bits to one value, in blocks of 16 values.

    codes: [rows, cols], uint8, from `sparq` with the same bits, stride and pairs, and zero 0. Returns uint8 [rows,
    row_bytes(...)]: with pairs 15 bytes a block for 5opt, 13 for 3opt and 6opt, 11 for 2opt and 7opt; one less without.
    Raises RuntimeError for another dtype, rank or family, and on the CPU for a code that is no value of its window; on
    CUDA such a code loses its low bits.
    """
    return torch.ops.qk.sparq_pack(codes, bits, stride, pairs)


def reference(codes: Tensor, bits: int, stride: int = 1, pairs: bool = True) -> Tensor:
    """The definition."""
    rows, cols = codes.shape
    values = F.pad(codes.int(), (0, -cols % BLOCK)).reshape(rows, -(-cols // BLOCK), BLOCK)
    shift = _steps(values, bits, stride)
    window = values >> shift * stride
    two = values.unflatten(-1, (-1, 2))
    split = (two == 0).sum(-1) == 1
    if pairs:
        value = two.sum(-1)  # of which one is 0
        up = _steps(value, 2 * bits, 1)
        wide = value >> up
        halves = torch.stack([wide & (2**bits - 1), wide >> bits], -1)
        where = torch.stack([up, (two[..., 0] == 0).int()], -1)
        window = torch.where(split.unsqueeze(-1), halves, window.unflatten(-1, (-1, 2))).flatten(-2)
        shift = torch.where(split.unsqueeze(-1), where, shift.unflatten(-1, (-1, 2))).flatten(-2)
    fields = [(window, bits), (shift, shift_bits(bits, stride))] + [(split.int(), 1)] * pairs
    return torch.cat([_joined(field, width) for field, width in fields], -1).flatten(1)


def _steps(values: Tensor, bits: int, stride: int) -> Tensor:
    """How many strides a window of `bits` bits moves up until it holds the top bit."""
    return sum((values >> at != 0).int() for at in range(bits, 8, stride)) + torch.zeros_like(values)


def _joined(fields: Tensor, width: int) -> Tensor:
    """[..., n] -> bytes [..., n * width / 8]: field i at bit i * width."""
    ones = (fields.unsqueeze(-1) >> torch.arange(width, device=fields.device) & 1).flatten(-2)
    return (ones.unflatten(-1, (-1, 8)) << torch.arange(8, device=fields.device)).sum(-1).to(torch.uint8)


@torch.library.register_fake("qk::sparq_pack")
def _(codes, bits, stride=1, pairs=True):
    check_family("sparq_pack", bits, stride)
    rows, cols = codes.shape
    return codes.new_empty(rows, row_bytes(cols, bits, stride, pairs))
