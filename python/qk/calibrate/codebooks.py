"""Rows of an embedding table to codes by codebooks: exact k-means in one dimension for each row, or books rows share.

Every function takes rows x [rows, cols], float32 and finite, works on all of them at once, and gives codes of `bits`
bits (2 or 4) with the numbers that a row stores:

    kmeans      value = books[row, code]             books [rows, 2^bits]
    two-tier    value = books[number[row], code]     books [books, 2^bits], number [rows]

Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables (2019).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TINY, TINY_FLOAT = 1e-300, 1e-37  # in place of a divisor of 0
BLOCK = 16  # columns at once in the dynamic program: their sums stay in the cache


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
