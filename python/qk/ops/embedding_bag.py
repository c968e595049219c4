"""Sums, means and maxima over rows of packed codes: lookups in a quantized table."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qk.ops._rows import on_one_device

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def embedding_bag(
    rows: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bits: int,
    cols: int,
    kind: str = "affine",
    dtype: str = "float16",
    codes_first: bool = True,
    books: Tensor | None = None,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """For each bag the sum, mean or maximum of the rows that it names, as torch's embedding_bag.

    rows: uint8 [N, bytes of a row] (docs/format.md): `cols` codes, value i at bit i * bits (8, 4 or 2), and behind
    them, or in front of them without codes_first, the row's numbers:
      affine: scale and offset of `dtype` (float16, bfloat16, float32); a value is code * scale + offset.
      codebook: 2^bits values of `dtype`; a value is codebook[code]. 2 or 4 bits.
      shared: int32, the number of a row of books, float32 [number of books, 2^bits]. 2 or 4 bits.
    Rows may lie further apart in memory than they are long. indices: int32 or int64, [count] with offsets (int32 or
    int64, where each bag begins; with include_last_offset also where the last ends), or [bags, size of a bag] without.
    per_sample_weights: float32 like indices, for sums. padding_idx: a row that takes no part.
    A sum adds the bag's values in order, each weighted value and each sum rounded. A mean is the sum divided by the
    number of rows that took part. An empty bag gives 0.
    Returns float32 [bags, cols].
    Raises RuntimeError for another dtype, device or shape, and on the CPU, naming the first that it meets, for an index
    that is no row, a number that is no book, and offsets that fall or leave the indices. On CUDA, where raising would
    wait for the device, such bags are NaN.
    """
    return torch.ops.qk.embedding_bag(
        rows,
        indices,
        offsets,
        bits,
        cols,
        kind,
        dtype,
        codes_first,
        books,
        mode,
        per_sample_weights,
        include_last_offset,
        padding_idx,
    )


def embedding(rows: Tensor, indices: Tensor, **form: Any) -> Tensor:
    """The rows that indices [...] name, as torch's embedding: float32 [..., cols].

    form: bits, cols and what else embedding_bag takes of the table.
    """
    return embedding_bag(rows, indices.reshape(-1, 1), None, **form).reshape(*indices.shape, form["cols"])


def row_bytes(cols: int, bits: int, kind: str = "affine", dtype: str = "float16") -> tuple[int, int]:
    """Bytes of a row's codes and of its numbers."""
    each = DTYPES[dtype].itemsize
    numbers = {"affine": 2 * each, "codebook": 2**bits * each, "shared": 4}[kind]
    return -(-cols * bits // 8), numbers


def values(
    rows: Tensor,
    bits: int,
    cols: int,
    kind: str = "affine",
    dtype: str = "float16",
    codes_first: bool = True,
    books: Tensor | None = None,
) -> Tensor:
    """What rows stand for, float32 [..., cols]."""
    codes_size, numbers_size = row_bytes(cols, bits, kind, dtype)
    sizes = [codes_size, numbers_size] if codes_first else [numbers_size, codes_size]
    parts = rows.split(sizes, -1)
    packed, numbers = parts if codes_first else parts[::-1]
    shifts = torch.arange(0, 8, bits, device=rows.device, dtype=torch.int32)
    codes = ((packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :cols]
    numbers = numbers.clone(memory_format=torch.contiguous_format)  # a view of another type must begin on a value
    if kind == "shared":
        book = books[numbers.view(torch.int32)[..., 0].long()]
        return book.gather(-1, codes.long())
    numbers = numbers.view(DTYPES[dtype]).float()
    if kind == "codebook":
        return numbers.gather(-1, codes.long())
    return codes.float() * numbers[..., :1] + numbers[..., 1:]


def reference(
    rows: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    bits: int,
    cols: int,
    kind: str = "affine",
    dtype: str = "float16",
    codes_first: bool = True,
    books: Tensor | None = None,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The definition: one row of every bag after the other."""
    if offsets is None:
        bags, size = indices.shape
        offsets = torch.arange(0, bags * size, size) if size else torch.zeros(bags)
        include_last_offset = False
    bounds = offsets.tolist() if include_last_offset else [*offsets.tolist(), indices.numel()]
    indices = indices.reshape(-1)
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if padding_idx is not None:
        padding_idx %= rows.shape[0]
    bags = []
    for begin, end in pairwise(bounds):
        kept = [i for i in range(int(begin), int(end)) if int(indices[i]) != padding_idx]
        row = values(rows[indices[kept].long()], bits, cols, kind, dtype, codes_first, books)
        total = torch.zeros(cols, device=rows.device)
        for n, i in enumerate(kept):
            if mode == "max":
                total = row[0] if n == 0 else torch.where(row[n] > total, row[n], total)
            else:
                total = total + (row[n] if weights is None else weights[i] * row[n])
        count = torch.tensor(float(max(len(kept), 1)), device=rows.device)
        bags.append(total / count if mode == "mean" else total)
    return torch.stack(bags) if bags else torch.zeros(0, cols, device=rows.device)


@torch.library.register_fake("qk::embedding_bag")
def _(
    rows,
    indices,
    offsets,
    bits,
    cols,
    kind="affine",
    dtype="float16",
    codes_first=True,
    books=None,
    mode="sum",
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    on_one_device("embedding_bag", rows, indices, offsets, books, per_sample_weights)
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    return torch.empty((bags, cols), dtype=torch.float32, device=rows.device)
