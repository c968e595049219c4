"""Rows of an embedding table to codes by a range for each row: value = code * scale + offset.

Every function takes rows x [rows, cols], float32 and finite, works on all of them at once, and gives codes of `bits`
bits (2, 4 or 8) with the scale and offset [rows] that a row stores. Those are rounded to `dtype` before codes are
chosen, so an error is that of what is stored. Codebooks in place of ranges: qk.calibrate.codebooks.

Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables (2019), for the methods; the walk of `greedy`
is that of torch.choose_qparams_optimized, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from qk.options import TableMethod

BINS = 200  # of the whole range: steps of the greedy walk, bins of a histogram
RATIO = {2: 0.5, 4: 0.16, 8: 0.16}  # part of the range that the walk takes off; 0.16 is torch's, too little for 2 bits
GOLDEN = 0.5 * (5**0.5 - 1)
TOGETHER = 1 << 20  # values of the rows that a search holds at once


class Affine(NamedTuple):
    """codes uint8 [rows, cols]; scale, offset float32 [rows], values of the dtype that stores them."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.codes.float() * self.scale[:, None] + self.offset[:, None]


Range = tuple[Tensor, Tensor]  # low, high [rows]


def rounded_range(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Offset and scale [rows] of rows that span low to high, as float32 that `dtype` holds.

    The offset is low, rounded; the scale reaches from there to high, so it is below 0 if low was rounded to beyond
    high. It is 1 for a row without extent and where `dtype` rounds it to 0 or 1 / scale is no float: all codes of such
    a row are 0, and its values the offset.
    """
    offset = low.to(dtype).float()
    scale = ((high - offset) / (2**bits - 1)).to(dtype).float()
    return offset, torch.where((scale == 0) | (1 / scale).isinf(), torch.ones_like(scale), scale)


def row_codes(x: Tensor, offset: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(rint((x - offset) * (1 / scale)), 0, 2^bits - 1), ties to even, as float32."""
    return ((x - offset[:, None]) * (1 / scale)[:, None]).round_().clamp_(0, 2**bits - 1)


def encode(x: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Affine:
    """Rows quantized over the range low to high [rows]."""
    offset, scale = rounded_range(low, high, bits, dtype)
    return Affine(row_codes(x, offset, scale, bits).to(torch.uint8), scale, offset)


def row_loss(x: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Length of the error of each row that is quantized over low to high; the squares are added in order.

    float32 [rows], bit for bit what torch.choose_qparams_optimized compares.
    """
    return _loss(x.t().contiguous(), low, high, bits, dtype)


def _loss(
    columns: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype, scratch: Tensor | None = None
) -> Tensor:
    """row_loss of columns [cols, rows]: with rows side by side, one column after the other is added to all of them."""
    offset, scale = rounded_range(low, high, bits, dtype)
    error = torch.sub(columns, offset, out=scratch)
    error.mul_(1 / scale).round_().clamp_(0, 2**bits - 1).mul_(scale).add_(offset)
    error.sub_(columns).square_()
    total = torch.zeros_like(offset)
    for column in error:
        total += column
    return total.sqrt_()


def symmetric_range(x: Tensor, bits: int, dtype: torch.dtype) -> Range:
    """SYM: from minus the largest magnitude to it."""
    top = x.abs().amax(1)
    return -top, top


def asymmetric_range(x: Tensor, bits: int, dtype: torch.dtype) -> Range:
    """ASYM: from the smallest to the largest value. The bytes of torch's 2- and 4-bit prepack."""
    return x.amin(1), x.amax(1)


def greedy_range(x: Tensor, bits: int, dtype: torch.dtype, bins: int = BINS, ratio: float | None = None) -> Range:
    """GREEDY, as published: takes a bin off the end that costs less, until `ratio` of the range is gone.

    A position counts only if both moves from it are worse and it is the best so far, so a row never gets worse than by
    its minimum and maximum, and keeps them if the loss falls to the end. A tie lowers the maximum. With ratio 0.16 the
    bytes of torch's prepack with optimized_qparams. ratio None: RATIO[bits].
    """
    return _walk(x, bits, dtype, bins, RATIO[bits] if ratio is None else ratio, every=False)


def greedy_plus_range(x: Tensor, bits: int, dtype: torch.dtype, bins: int = BINS, ratio: float = 0.5) -> Range:
    """The same walk, taken further, of which every position counts, the last one too: never worse than `greedy`."""
    return _walk(x, bits, dtype, bins, ratio, every=True)


def _walk(x: Tensor, bits: int, dtype: torch.dtype, bins: int, ratio: float, every: bool) -> Range:
    """The greedy walk of all rows. every: each position counts, not only one between two worse moves."""
    columns = x.t().contiguous()
    scratch = torch.empty_like(columns)
    low, high = asymmetric_range(x, bits, dtype)
    step = (high - low) / bins
    kept = int(bins * (1 - float(np.float32(ratio)))) * step  # in torch's types
    loss = _loss(columns, low, high, bits, dtype)
    best_low, best_high, best = low, high, loss
    going = torch.ones_like(low, dtype=torch.bool)
    while bool((going := going & (low + kept < high)).any()):
        raised = _loss(columns, low + step, high, bits, dtype, scratch)
        lowered = _loss(columns, low, high - step, bits, dtype, scratch)
        if not every:
            better = going & (loss < raised) & (loss < lowered) & (loss < best)
            best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
            best = torch.where(better, loss, best)
        raise_low = raised < lowered
        going = going & torch.where(raise_low, low + step != low, high - step != high)  # else the walk stands still
        low = torch.where(going & raise_low, low + step, low)
        high = torch.where(going & ~raise_low, high - step, high)
        loss = torch.where(raise_low, raised, lowered)
        if every:
            better = going & (loss < best)
            best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
            best = torch.where(better, loss, best)
    return best_low, best_high


def golden_range(x: Tensor, bits: int, dtype: torch.dtype, rounds: int = 24) -> Range:
    """GSS: golden section search for the clip c of the range -c to c. Never worse than `symmetric`.

    The loss has many small valleys; the best of all clips that were tried is taken.
    """
    columns, top = x.t().contiguous(), x.abs().amax(1)
    scratch = torch.empty_like(columns)

    def loss(clip: Tensor) -> Tensor:
        return _loss(columns, -clip, clip, bits, dtype, scratch)

    best, best_loss = top, loss(top)
    low, high = torch.zeros_like(top), top
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    left_loss, right_loss = loss(left), loss(right)
    for _ in range(rounds):
        for clip, found in ((left, left_loss), (right, right_loss)):
            best, best_loss = torch.where(found < best_loss, clip, best), torch.minimum(best_loss, found)
        to_left = left_loss < right_loss
        low, high = torch.where(to_left, low, left), torch.where(to_left, right, high)
        new = torch.where(to_left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        new_loss = loss(new)
        left, right = torch.where(to_left, new, right), torch.where(to_left, left, new)
        left_loss, right_loss = torch.where(to_left, new_loss, right_loss), torch.where(to_left, left_loss, new_loss)
    return -best, best


def histogram_range(x: Tensor, bits: int, dtype: torch.dtype, bins: int = BINS) -> Range:
    """HIST-APPROX: cuts off value after value at the end with the wider gap, until the histogram's loss rises.

    Never worse than `asymmetric`: the range found is kept where its true loss is smaller.
    """
    count, low, width, place = _histogram(x, bins)
    losses, _ = _pair_losses(bits, bins)
    by_pair = losses.t().contiguous().to(x.device)
    place = place.sort(1).values
    rows, cols = x.shape
    first, last = torch.zeros(2, rows, dtype=torch.int64, device=x.device)  # how many values are cut off
    start, end = torch.zeros_like(first), torch.full_like(first, bins - 1)
    loss = torch.full((rows,), torch.inf, device=x.device)
    going = torch.arange(rows, device=x.device)
    for _ in range(cols - 1):
        own, at = place[going], torch.arange(len(going), device=x.device)
        next_start = own[at, (first[going] + 1).clamp_max(cols - 1)]
        next_end = own[at, (cols - 2 - last[going]).clamp_min(0)]
        raise_start = next_start - start[going] > end[going] - next_end
        new_start = torch.where(raise_start, next_start, start[going])
        new_end = torch.where(raise_start, end[going], next_end)
        valid = new_start < new_end
        pair = _pair(new_start, torch.maximum(new_end, new_start), bins)
        new_loss = (by_pair[pair] * count[going]).sum(1)
        on = valid & ~(new_loss > loss[going])
        going = going[on]
        if not len(going):
            break
        first[going] += raise_start[on].long()
        last[going] += (~raise_start[on]).long()
        start[going], end[going], loss[going] = new_start[on], new_end[on], new_loss[on]
    return _if_better(x, low + start * width, low + (end + 1) * width, bits, dtype)


def histogram_brute_range(x: Tensor, bits: int, dtype: torch.dtype, bins: int = 100) -> Range:
    """HIST-BRUTE: of all pairs of bins the one between which the histogram's loss is least.

    Never worse than `asymmetric`. A bin's share of the loss depends on the pair alone, so the losses of all pairs
    are one product of matrices.
    """
    count, low, width, _ = _histogram(x, bins)
    losses, pairs = _pair_losses(bits, bins)
    losses, pairs = losses.to(x.device), pairs.to(x.device)
    best = torch.cat([(part @ losses).argmin(1) for part in count.split(1024)]) if len(x) else count.long()[:, 0]
    start, end = pairs[best].unbind(1)
    return _if_better(x, low + start * width, low + (end + 1) * width, bits, dtype)


def _if_better(x: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Range:
    """The range where it has a smaller loss than minimum and maximum, which are taken elsewhere."""
    whole = asymmetric_range(x, bits, dtype)
    better = row_loss(x, low, high, bits, dtype) < row_loss(x, *whole, bits, dtype)
    return torch.where(better, low, whole[0]), torch.where(better, high, whole[1])


def _histogram(x: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts [rows, bins], low [rows], width of a bin [rows], the bin of each value [rows, cols]."""
    low, high = x.amin(1), x.amax(1)
    width = (high - low) / bins
    place = ((x - low[:, None]) / torch.where(width > 0, width, 1)[:, None]).long().clamp_(0, bins - 1)
    count = torch.zeros(len(x), bins, device=x.device).scatter_add_(1, place, torch.ones_like(x))
    return count, low, width, place


def _pair(start: Tensor, end: Tensor, bins: int) -> Tensor:
    """The place of start <= end among all pairs, in the order of torch.triu_indices."""
    return start * bins - start * (start - 1) // 2 + end - start


@lru_cache(4)
def _pair_losses(bits: int, bins: int) -> tuple[Tensor, Tensor]:
    """Mean squared error, in squared widths, of a value in each bin quantized over bins start to end: [bins, pairs].

    And the pairs [pairs, 2]. A value is anywhere in its bin: four places stand for it.
    """
    pairs = torch.triu_indices(bins, bins).t().contiguous()
    low, high = pairs[:, 0].float(), pairs[:, 1].float() + 1
    step = (high - low) / (2**bits - 1)
    losses = torch.zeros(bins, len(pairs))
    for place in (0.125, 0.375, 0.625, 0.875):
        value = torch.arange(bins)[:, None] + place
        code = ((value - low) / step).round_().clamp_(0, 2**bits - 1)
        losses += code.mul_(step).add_(low).sub_(value).square_() / 4
    return losses, pairs


RANGES: dict[str, Callable[..., Range]] = {
    "symmetric": symmetric_range,
    "asymmetric": asymmetric_range,
    "greedy": greedy_range,
    "greedy+": greedy_plus_range,
    "golden": golden_range,
    "histogram": histogram_range,
    "histogram-brute": histogram_brute_range,
}
METHODS = get_args(TableMethod)


def by_range(x: Tensor, bits: int, dtype: torch.dtype, method: str, **options: float) -> Affine:
    """Rows quantized over the ranges that `method`, a name in RANGES, finds. options: of its function."""
    find = RANGES[method]
    parts = [encode(p, *find(p, bits, dtype, **options), bits, dtype) for p in x.split(max(1, TOGETHER // x.shape[1]))]
    return Affine(*(torch.cat(field) for field in zip(*parts, strict=True)))
