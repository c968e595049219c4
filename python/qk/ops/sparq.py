"""SPARQ: 8-bit activation codes cut to windows of fewer bits, without moving the decimal point of the others.

Source: Shomron et al., Post-Training Sparsity-Aware Quantization (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = {"5opt": (4, 1), "3opt": (4, 2), "2opt": (4, 4), "6opt": (3, 1), "7opt": (2, 1)}  # name -> bits, stride


def sparq(
    codes: Tensor, bits: int, stride: int = 1, round: bool = True, pairs: bool = True, zero: Tensor | None = None
) -> Tensor:
    """Each code as (window of `bits` bits) << shift, the shift the smallest allowed one that keeps its top bit.

    codes: [..., cols], uint8, of 8 bits. bits: 2, 3 or 4. stride: shifts are its multiples up to 8 - bits;
    1, or with 4 bits 1, 2 or 4. round: to the nearest window value, ties to even, never past the window's largest;
    else the bits below the window are cut off. pairs: values 2i and 2i + 1 along cols share their bits, so one whose
    partner is 0 gets a window of 2 * bits bits at any shift; the last of an odd number has the partner 0.
    zero: int32, one value; the code that stands for 0, where that is not code 0 (an extension of the paper's rule).
    What is cut is then the distance from it, with its sign; where rounding up would pass the last code, it cuts off.
    Returns uint8 values of the same shape and scale, contiguous. Raises RuntimeError for another dtype or family, a
    zero that does not fit, or codes without a dimension.
    """
    return torch.ops.qk.sparq(codes, bits, stride, round, pairs, zero)


def reference(
    codes: Tensor, bits: int, stride: int = 1, round: bool = True, pairs: bool = True, zero: Tensor | None = None
) -> Tensor:
    """The definition."""
    at = 0 if zero is None else int(zero)
    values = codes.float() - at
    cut = _cut(values.abs(), bits, stride, round, pairs)
    room = torch.where(values < 0, at, 255 - at)
    cut = torch.where(cut > room, _cut(values.abs(), bits, stride, False, pairs), cut)
    return (at + values.sign() * cut).to(torch.uint8)


def _cut(values: Tensor, bits: int, stride: int, round: bool, pairs: bool) -> Tensor:
    """values: [..., cols] float32, whole, from 0 to 255 -> the same in their windows."""
    narrow = window(values, bits, stride, round)
    if not pairs or not values.numel():
        return narrow
    two = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)).unflatten(-1, (-1, 2))
    partner = two.flip(-1).flatten(-2)[..., : values.shape[-1]]
    return torch.where(partner == 0, window(values, 2 * bits, 1, round), narrow)


def window(values: Tensor, bits: int, stride: int, round: bool) -> Tensor:
    """values [...] float32, whole, below 256 -> the same with at most `bits` significant bits."""
    shift = torch.zeros_like(values)
    for s in range(0, 8 - bits, stride):  # too small a shift for this value: the next one
        shift = torch.where(values >= 2 ** (bits + s), s + stride, shift)
    units = values / 2**shift
    cut = torch.round(units) if round else torch.floor(units)
    return cut.clamp(max=2**bits - 1) * 2**shift


def check_family(op: str, bits: int, stride: int) -> None:
    """Raises RuntimeError, as the kernels do, for what is none of FAMILIES: no kernel runs where shapes are traced."""
    if (bits, stride) not in FAMILIES.values():
        expected = ", ".join(f"{b} and {s}" for b, s in FAMILIES.values())
        raise RuntimeError(f"qk::{op}: bits and stride must be {expected}, got {bits} and {stride}.")


@torch.library.register_fake("qk::sparq")
def _(codes, bits, stride=1, round=True, pairs=True, zero=None):
    check_family("sparq", bits, stride)
    return codes.new_empty(codes.shape)
