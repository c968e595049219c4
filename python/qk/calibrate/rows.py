"""Rows of an embedding table to codes: by a range for each row, a codebook for each row, or codebooks that rows share.

Every function takes rows x [rows, cols], float32 and finite, works on all of them at once, and gives codes of `bits`
bits (2, 4 or 8) with the numbers that a row stores:

    ranges      value = code * scale + offset        scale, offset [rows]
    kmeans      value = books[row, code]             books [rows, 2^bits]
    two-tier    value = books[number[row], code]     books [books, 2^bits], number [rows]

Numbers are rounded to `dtype` before codes are chosen, so an error is that of what is stored.

Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables (2019), for the methods; the walk of `greedy`
is that of torch.choose_qparams_optimized, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from qk.spec import TableMethod

BINS = 200  # of the whole range: steps of the greedy walk, bins of a histogram
RATIO = {2: 0.5, 4: 0.16, 8: 0.16}  # part of the range that the walk takes off; 0.16 is torch's, too little for 2 bits
GOLDEN = 0.5 * (5**0.5 - 1)
TINY, TINY_FLOAT = 1e-300, 1e-37  # in place of a divisor of 0
BLOCK = 16  # columns at once in the dynamic program: their sums stay in the cache
TOGETHER = 1 << 20  # values of the rows that a search holds at once


class Affine(NamedTuple):
    """codes uint8 [rows, cols]; scale, offset float32 [rows], values of the dtype that stores them."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def values(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.codes.float() * self.scale[:, None] + self.offset[:, None]


class Books(NamedTuple):
    """codes uint8 [rows, cols]; books float32 [rows, 2^bits], rising, values of the dtype that stores them."""

    codes: Tensor
    books: Tensor

    def values(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.books.gather(1, self.codes.long())


class Shared(NamedTuple):
    """codes uint8 [rows, cols]; number int32 [rows], the row of books float32 [books, 2^bits] that each uses."""

    codes: Tensor
    number: Tensor
    books: Tensor

    def values(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.books[self.number.long()].gather(1, self.codes.long())


Range = tuple[Tensor, Tensor]  # low, high [rows]


# --- ranges -----------------------------------------------------------------------------------------------------------


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


# --- codebooks --------------------------------------------------------------------------------------------------------


def kmeans(x: Tensor, bits: int, dtype: torch.dtype) -> Books:
    """KMEANS: for each row the 2^bits values with the least squared error, exact by dynamic programming. 2 or 4 bits.

    The values are then rounded to `dtype`, and each value takes the nearest. No seeds; rows do not depend on each
    other. A row of at most 2^bits columns keeps all of its values.
    """
    centres = torch.from_numpy(best_centres(x.double().cpu().numpy(), None, 2**bits))
    books = centres.to(dtype).float().to(x.device)
    return Books(nearest(x, books), books)


def nearest(x: Tensor, books: Tensor) -> Tensor:
    """For each value the number of the nearest in its row's book (rising, [rows, entries]), uint8; of two the lower."""
    books = books.double()
    middles = (books[:, 1:] + books[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), x.double().contiguous()).to(torch.uint8)


def best_centres(x: np.ndarray, weight: np.ndarray | None, count: int) -> np.ndarray:
    """The centres [rows, count], rising, that minimize the weighted squared distance of values to their nearest one.

    x: float64 [rows, cols], in any order. weight: likewise, not negative, None for 1. Exact but for float64 rounding.
    Sorted values in segments: the best cost of the first i values in j segments is the least, over where the last one
    begins, of the cost of those before it in j - 1 and its own. No segment may cost more than a whole solution does,
    which bounds their length. O(count * cols * longest) a row.
    """
    rows, cols = x.shape
    if rows == 0:
        return np.zeros((0, count))
    order = np.argsort(x, axis=1, kind="stable")
    x = np.take_along_axis(x, order, 1)
    weight = None if weight is None else np.take_along_axis(weight, order, 1)
    each = max(8, min(64, (1 << 18) // (cols * cols)))  # rows at a time: their costs stay in the cache
    parts = [slice(i, i + each) for i in range(0, rows, each)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        done = pool.map(lambda p: _centres(x[p].T, None if weight is None else weight[p].T, min(count, cols)), parts)
        centres = np.concatenate(list(done), 1).T
    return np.concatenate([centres, np.repeat(centres[:, -1:], count - centres.shape[1], 1)], 1)


def _centres(x: np.ndarray, weight: np.ndarray | None, count: int) -> np.ndarray:
    """best_centres [count, rows] of sorted columns x [cols, rows]."""
    cols, rows = x.shape
    if count == cols:
        return x
    shift = x.mean(0)
    scale = np.maximum(np.abs(x - shift).max(0), TINY)
    x = (x - shift) / scale
    weight = np.ones_like(x) if weight is None else weight
    sums = np.zeros((3, cols + 1, rows))  # of weight, weight * x, weight * x^2 of the values before each
    np.cumsum([weight, weight * x, weight * x * x], 1, out=sums[:, 1:])
    cost = np.full((cols, cols, rows), np.inf)  # [m, i]: of the segment of the values m to i
    for m in range(cols):
        cost[m, m:] = _spread(sums[:, m + 1 :] - sums[:, m, None])
    longest = _longest(x, sums, cost, count)
    best = [cost[0]]  # [j][i]: of the values up to i in j + 1 segments
    scratch = np.empty((cols, BLOCK, rows))
    for j in range(1, count - 1):
        new = np.full((cols, rows), np.inf)
        for begin in range(j, cols, BLOCK):
            end = min(begin + BLOCK, cols)
            first = max(j, begin - longest + 1)
            total = scratch[: end - first, : end - begin]
            np.add(cost[first:end, begin:end], best[-1][first - 1 : end - 1, None], out=total)
            np.minimum.reduce(total, axis=0, out=new[begin:end])
        best.append(new)
    bounds = [np.full(rows, cols)]  # back from the end: where each row's last segment begins
    for before in reversed(best):
        total = before[:-1] + cost[1:, bounds[-1] - 1, np.arange(rows)]
        bounds.append(total.argmin(0) + 1)
    bounds = np.stack([np.zeros(rows, int), *bounds[::-1]])
    if count == 1:
        bounds = np.stack([np.zeros(rows, int), np.full(rows, cols)])
    mass, total, _ = np.diff(np.take_along_axis(sums, bounds[None], 1), axis=1)
    lightest = np.take_along_axis(x, bounds[:-1], 0)  # for a segment without weight
    centres = np.where(mass > 0, total / np.maximum(mass, TINY), lightest)
    return np.maximum.accumulate(centres, 0) * scale + shift


def _spread(sums: np.ndarray) -> np.ndarray:
    """Weighted squared distance to their mean of values with these sums of weight, weight * x and weight * x^2."""
    return np.maximum(sums[2] - sums[1] * sums[1] / np.maximum(sums[0], TINY), 0)


def _longest(x: np.ndarray, sums: np.ndarray, cost: np.ndarray, count: int) -> int:
    """No segment of a best solution is longer in any row: a longer one costs more than equal parts of the range do."""
    cols, rows = x.shape
    inner = [(x < x[0] + (x[-1] - x[0]) * j / count).sum(0) for j in range(1, count)]
    bounds = np.stack([np.zeros(rows, int), *inner, np.full(rows, cols)])
    limit = _spread(np.diff(np.take_along_axis(sums, bounds[None], 1), axis=1)).sum(0) * (1 + 1e-9) + 1e-12
    lengths = np.arange(cols) - np.arange(cols)[:, None] + 1
    return int(lengths[(cost <= limit).any(2)].max())


def fit_books(x: Tensor, bits: int, books: int, rounds: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two-tier codebooks of rows: blocks of similar rows, and for each block one book for all of its values.

    Blocks by k-means on the rows from `books` of them drawn by the seed; a book by exact k-means on a histogram of its
    block's values, then by Lloyd's steps on the values themselves.
    Returns the middles of the blocks [books, cols] and books [books, 2^bits], rising, float32. books is lowered to the
    number of rows. Same seed, same result.
    """
    books = max(1, min(books, len(x)))
    draw = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:books]
    middles = x[draw.to(x.device)].clone()
    for _ in range(rounds):
        number = block_of(x, middles).long()
        size = torch.bincount(number, minlength=books)[:, None]
        total = torch.zeros_like(middles).index_add_(0, number, x)
        middles = torch.where(size > 0, total / size.clamp_min(1), middles)  # a block without rows stays where it is
    number = block_of(x, middles).long()
    entries = torch.from_numpy(_first_books(x, number, books, 2**bits)).float().to(x.device)
    for _ in range(rounds):
        place = (nearest(x, entries[number]).long() + number[:, None] * 2**bits).flatten()
        size = torch.bincount(place, minlength=entries.numel())
        total = torch.zeros(entries.numel(), dtype=torch.float64, device=x.device)
        total = total.index_add_(0, place, x.flatten().double())
        entries = torch.where(size > 0, total / size.clamp_min(1), entries.flatten().double())
        entries = entries.float().reshape(books, -1).sort(1).values
    return middles, entries


def _first_books(x: Tensor, number: Tensor, books: int, entries: int, bins: int = 128) -> np.ndarray:
    """Exact k-means of each block's values, `bins` means of neighbours in their place: float64 [books, entries]."""
    low = torch.full((books,), torch.inf, device=x.device).scatter_reduce_(0, number, x.amin(1), "amin")
    high = torch.full((books,), -torch.inf, device=x.device).scatter_reduce_(0, number, x.amax(1), "amax")
    empty = ~low.isfinite()
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
    width = ((high - low) / bins).clamp_min(TINY_FLOAT)
    place = ((x - low[number][:, None]) / width[number][:, None]).long().clamp_(0, bins - 1)
    place = (place + number[:, None] * bins).flatten()
    count = torch.bincount(place, minlength=books * bins).double()
    total = torch.zeros_like(count).index_add_(0, place, x.flatten().double())
    centre = (low[:, None] + (torch.arange(bins, device=x.device) + 0.5) * width[:, None]).double().flatten()
    mean = torch.where(count > 0, total / count.clamp_min(1), centre)
    return best_centres(mean.reshape(books, bins).cpu().numpy(), count.reshape(books, bins).cpu().numpy(), entries)


def block_of(x: Tensor, middles: Tensor) -> Tensor:
    """The number of the nearest middle [books, cols] of each row, int32."""
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.int32, device=x.device)
    half = middles.square().sum(1) / 2
    parts = x.split(max(1, (1 << 22) // len(middles)))
    return torch.cat([(half - part @ middles.t()).argmin(1) for part in parts]).to(torch.int32)


def two_tier(x: Tensor, middles: Tensor, books: Tensor) -> Shared:
    """KMEANS-CLS: rows in the books that fit_books made of them, or of a sample of the table that they are from."""
    number = block_of(x, middles)
    return Shared(nearest(x, books[number.long()]), number, books)
