"""Quantized embedding tables: packed rows, each with its own scale and offset, and the modules that look them up.

Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables (2019); the greedy search is that of torch's
choose_qparams_optimized. Bytes of a row: docs/format.md.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops
from qk.errors import fail
from qk.ops.embedding_bag import DTYPES

BINS = 200  # steps of the greedy search over the whole range
SHRINK = {2: 0.5, 4: 0.16, 8: 0.16}  # how far it goes; 0.16 is torch's and too little for 2 bits
AT_ONCE = 1 << 22  # values of a piece of a table, so that a search needs no second table


def rounded_range(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Offset and scale [rows] of rows that span low to high, as float32 that `dtype` holds.

    The offset is low, rounded; the scale reaches from there to high. It is 1 for a row without extent.
    """
    offset = low.to(dtype).float()
    scale = ((high - offset) / (2**bits - 1)).to(dtype).float()
    good = (scale > 0) & (1 / scale).isfinite() & (high > offset)
    return offset, torch.where(good, scale, torch.ones_like(scale))


def row_codes(x: Tensor, offset: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of rows [rows, cols], as float32."""
    return ((x - offset[:, None]) * (1 / scale)[:, None]).round().clamp(0, 2**bits - 1)


def row_loss(x: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Length of the error of each row that is quantized over low to high."""
    offset, scale = rounded_range(low, high, bits, dtype)
    values = row_codes(x, offset, scale, bits) * scale[:, None] + offset[:, None]
    return (values - x).square().sum(1).sqrt()


def minmax_range(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The range of each row [rows, cols]: its smallest and its largest value."""
    return x.amin(1), x.amax(1)


def greedy_range(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A range of each row within its minimum and maximum, found by taking off the end that costs less.

    As in torch a position counts only if both moves from it are worse, so a row never gets worse than by minmax.
    """
    low, high = minmax_range(x, bits, dtype)
    step = (high - low) / BINS
    shortest = int(BINS * (1 - SHRINK[bits])) * step
    loss = row_loss(x, low, high, bits, dtype)
    best_low, best_high, best = low.clone(), high.clone(), loss.clone()
    while bool((going := low + shortest < high).any()):
        raised = row_loss(x, low + step, high, bits, dtype)
        lowered = row_loss(x, low, high - step, bits, dtype)
        better = going & (loss < raised) & (loss < lowered) & (loss < best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        best = torch.where(better, loss, best)
        raise_low = raised < lowered
        low = torch.where(going & raise_low, low + step, low)
        high = torch.where(going & ~raise_low, high - step, high)
        loss = torch.where(raise_low, raised, lowered)
    return best_low, best_high


METHODS = {"minmax": minmax_range, "greedy": greedy_range}


def pack_table(weight: Tensor, bits: int, scale_dtype: str = "float16", method: str = "minmax") -> Tensor:
    """Rows of codes with scale and offset behind them, uint8 [N, bytes of a row], from a float table [N, cols].

    bits: 2, 4 or 8. scale_dtype: float16, bfloat16 or float32. method: minmax or greedy.
    Raises QkError for other arguments, values that are not finite, and values beyond what scale_dtype holds.
    """
    stage = "qk.pack_table"
    if bits not in (2, 4, 8):
        raise fail(stage, "bits", "2, 4 or 8", bits)
    if scale_dtype not in DTYPES:
        raise fail(stage, "scale_dtype", " or ".join(DTYPES), scale_dtype)
    if method not in METHODS:
        raise fail(stage, "method", " or ".join(METHODS), method)
    if weight.dim() != 2 or not weight.dtype.is_floating_point or weight.shape[1] == 0:
        raise fail(stage, "weight", "a float table [N, cols]", f"{weight.dtype} {list(weight.shape)}")
    dtype, cols = DTYPES[scale_dtype], weight.shape[1]
    pieces = []
    with torch.no_grad():
        for piece in weight.detach().split(max(1, AT_ONCE // cols)):
            x = piece.float()
            if not bool(x.isfinite().all()):
                raise fail(stage, "weight", "finite", "NaN or Inf")
            offset, scale = rounded_range(*METHODS[method](x, bits, dtype), bits, dtype) if len(x) else x[:, :2].t()
            if not bool((offset.isfinite() & scale.isfinite()).all()):
                got = float(x.abs().max())
                raise fail(stage, "weight", f"within the range of {scale_dtype}", got, "Use scale_dtype float32.")
            codes = row_codes(x, offset, scale, bits).to(torch.uint8)
            packed = ops.pack(codes, bits)[:, : -(-cols * bits // 8)]
            numbers = torch.stack([scale, offset], 1).to(dtype).view(torch.uint8)
            pieces.append(torch.cat([packed, numbers], 1))
    return torch.cat(pieces)


def in_huge_pages(table: Tensor) -> Tensor:
    """A copy of a large CPU tensor whose memory the system maps in large pieces, where it can.

    A lookup reads two cache lines from anywhere: with pages of 4 KB finding them takes longer than reading them.
    """
    if table.device.type != "cpu" or table.nbytes < 4 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return table
    memory = mmap.mmap(-1, table.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        return table
    return torch.frombuffer(memory, dtype=table.dtype).view(table.shape).copy_(table)


class _Table(nn.Module):
    """What QEmbeddingBag and QEmbedding share: rows, and how to read them (see `qk.ops.embedding_bag`)."""

    rows: Tensor
    books: Tensor | None

    def __init__(
        self,
        rows: Tensor,
        bits: int,
        cols: int,
        kind: str = "affine",
        dtype: str = "float16",
        codes_first: bool = True,
        books: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.cols, self.kind, self.dtype, self.codes_first = bits, cols, kind, dtype, codes_first
        self.register_buffer("rows", in_huge_pages(rows))
        self.register_buffer("books", books)
        self._bags(torch.zeros(0, 1, dtype=torch.int64, device=rows.device), None)  # refuses what does not fit

    def _bags(self, indices: Tensor, offsets: Tensor | None, **options: Any) -> Tensor:
        return ops.embedding_bag(
            self.rows,
            indices,
            offsets,
            self.bits,
            self.cols,
            self.kind,
            self.dtype,
            self.codes_first,
            self.books,
            **options,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> _Table:
        books = self.books
        super()._apply(fn, recurse)
        if books is not None and self.books.dtype != books.dtype:  # half() and the like move, but keep the numbers
            self.books = books.to(self.books.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.rows.shape[0]}, {self.cols}, bits={self.bits}, kind={self.kind}, dtype={self.dtype}"


class QEmbeddingBag(_Table):
    """nn.EmbeddingBag on packed rows: float32 [bags, cols]."""

    def __init__(
        self,
        *table: Any,
        mode: str = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> None:
        """table, options: the arguments of the rows, as in `qk.ops.embedding_bag`: rows, bits, cols, kind, ..."""
        super().__init__(*table, **options)
        self.mode, self.include_last_offset, self.padding_idx = mode, include_last_offset, padding_idx

    @classmethod
    def from_float(
        cls, module: nn.EmbeddingBag, bits: int, scale_dtype: str = "float16", method: str = "minmax"
    ) -> QEmbeddingBag:
        """From a float module: see `pack_table`. Raises QkError for one with max_norm."""
        _check_norm(cls, module)
        return cls(
            pack_table(module.weight, bits, scale_dtype, method),
            bits,
            module.embedding_dim,
            dtype=scale_dtype,
            mode=module.mode,
            include_last_offset=module.include_last_offset,
            padding_idx=module.padding_idx,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return self._bags(
            input,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset and offsets is not None,
            padding_idx=self.padding_idx,
        )


class QEmbedding(_Table):
    """nn.Embedding on packed rows: indices [...] to float32 [..., cols]."""

    @classmethod
    def from_float(
        cls, module: nn.Embedding, bits: int, scale_dtype: str = "float16", method: str = "minmax"
    ) -> QEmbedding:
        """From a float module: see `pack_table`. Raises QkError for one with max_norm."""
        _check_norm(cls, module)
        rows = pack_table(module.weight, bits, scale_dtype, method)
        return cls(rows, bits, module.embedding_dim, dtype=scale_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self._bags(input.reshape(-1, 1), None).reshape(*input.shape, self.cols)


def _check_norm(cls: type, module: nn.Module) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise fail(cls.__name__, "max_norm", "None", module.max_norm, "Renormalize the table before.")
