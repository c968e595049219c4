"""SPARQ: 8-bit activation codes cut to windows of fewer bits, without moving the decimal point of the others.

Source: Shomron et al., Post-Training Sparsity-Aware Quantization (2021). Its families as (bits, stride): 5opt (4, 1),
3opt (4, 2), 2opt (4, 4), 6opt (3, 1), 7opt (2, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparq(codes: Tensor, bits: int, stride: int = 1, round: bool = True, pairs: bool = True) -> Tensor:
    """Each code as (window of `bits` bits) << shift, the shift the smallest allowed one that keeps its top bit.

    codes: [..., cols], uint8, of 8 bits with zero 0. bits: 2, 3 or 4. stride: shifts are its multiples up to 8 - bits;
    1, or with 4 bits 1, 2 or 4. round: to the nearest window value, ties to even, never past the window's largest;
    else the bits below the window are cut off. pairs: values 2i and 2i + 1 along cols share their bits, so one whose
    partner is 0 gets a window of 2 * bits bits at any shift; the last of an odd number has the partner 0.
    Returns uint8 values of the same shape and scale, contiguous. Raises RuntimeError for another dtype or family, or
    codes without a dimension.
    """
    return torch.ops.qk.sparq(codes, bits, stride, round, pairs)


def reference(codes: Tensor, bits: int, stride: int = 1, round: bool = True, pairs: bool = True) -> Tensor:
    """The definition."""
    values = codes.float()
    narrow = window(values, bits, stride, round)
    if not pairs:
        return narrow.to(torch.uint8)
    wide = window(values, 2 * bits, 1, round)
    odd = codes.shape[-1] % 2
    two = torch.nn.functional.pad(values, (0, odd)).unflatten(-1, (-1, 2)) if codes.numel() else values
    partner = two.flip(-1).reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]] if codes.numel() else values
    return torch.where(partner == 0, wide, narrow).to(torch.uint8)


def window(values: Tensor, bits: int, stride: int, round: bool) -> Tensor:
    """values [...] float32, whole, below 256 -> the same with at most `bits` significant bits."""
    shift = torch.zeros_like(values)
    for s in range(0, 8 - bits, stride):  # too small a shift for this value: the next one
        shift = torch.where(values >= 2 ** (bits + s), s + stride, shift)
    units = values / 2**shift
    cut = torch.round(units) if round else torch.floor(units)
    return cut.clamp(max=2**bits - 1) * 2**shift


@torch.library.register_fake("qk::sparq")
def _(codes, bits, stride=1, round=True, pairs=True):
    return codes.new_empty(codes.shape)
