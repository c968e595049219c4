"""Quantized embedding tables: rows of codes with their numbers, and the modules that look them up.

How codes are chosen: qk.methods.embedding. Bytes of a row: docs/format.md. Tables beyond memory: qk.deploy.table_file.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qk import ops
from qk.errors import fail
from qk.methods import embedding as methods
from qk.ops.embedding_bag import DTYPES, row_bytes, values

STAGE = "qk.quantize_embedding"
AT_ONCE = 1 << 22  # values of a piece of a table, so that a search needs no second table
SAMPLE = 1 << 16  # rows to which the books of two-tier are fitted
BOOKS = 1024  # of two-tier, at most, unless asked for


@dataclass(frozen=True)
class Table:
    """rows uint8 [N, bytes of a row] and how to read them, as `qk.ops.embedding_bag` takes it."""

    rows: Tensor
    bits: int
    cols: int
    kind: str = "affine"
    dtype: str = "float16"
    books: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of rows and books."""
        return self.rows.nbytes + (0 if self.books is None else self.books.nbytes)

    def values(self) -> Tensor:
        """What the rows stand for, float32 [N, cols]."""
        return values(self.rows, self.bits, self.cols, self.kind, self.dtype, books=self.books)


class Packer:
    """Turns pieces of a float table [N, cols] into packed rows; all checks of the arguments are made here.

    sample: a function of a number of rows that gives so many of the table, to which two-tier fits its books.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sample: Callable[[int], Tensor],
        bits: int,
        method: str,
        scale_dtype: str | torch.dtype,
        options: dict[str, Any],
        stage: str = STAGE,
    ) -> None:
        if bits not in (2, 4, 8):
            raise fail(stage, "bits", "2, 4 or 8", bits)
        dtype = str(scale_dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise fail(stage, "scale_dtype", " or ".join(DTYPES), dtype)
        if method not in methods.METHODS:
            raise fail(stage, "method", " or ".join(methods.METHODS), method)
        if bits == 8 and method not in methods.RANGES:
            raise fail(stage, "bits", f"2 or 4 for {method}", bits, "A book of 256 values a row saves nothing.")
        self.stage, self.bits, self.cols, self.method, self.dtype = stage, bits, shape[1], method, dtype
        self.kind = {"kmeans": "codebook", "two-tier": "shared"}.get(method, "affine")
        self.options = _checked(options, method, stage)
        self.middles = self.books = None
        if method == "two-tier":
            count = self.options.pop("books", None) or max(1, min(shape[0] // 32, BOOKS))
            rows = self._finite(sample(SAMPLE))
            if len(rows):
                self.middles, self.books = methods.fit_books(rows, bits, count, **self.options)
            else:
                self.middles, self.books = rows.new_zeros(1, self.cols), rows.new_zeros(1, 2**bits)

    @property
    def row_bytes(self) -> int:
        """Of a packed row."""
        return sum(row_bytes(self.cols, self.bits, self.kind, self.dtype))

    @property
    def pieces(self) -> int:
        """Rows to pack at once."""
        return max(1, AT_ONCE // self.cols)

    def __call__(self, piece: Tensor) -> Tensor:
        """Packed rows uint8 [n, row_bytes]. Raises QkError for values that are not finite or beyond dtype."""
        x, dtype = self._finite(piece), DTYPES[self.dtype]
        if len(x) == 0:
            return torch.zeros(0, self.row_bytes, dtype=torch.uint8, device=x.device)
        if self.kind == "affine":
            coded = methods.by_range(x, self.bits, dtype, self.method, **self.options)
            numbers = torch.stack([coded.scale, coded.offset], 1)
        elif self.kind == "codebook":
            coded = methods.kmeans(x, self.bits, dtype)
            numbers = coded.books
        else:
            coded = methods.two_tier(x, self.middles.to(x.device), self.books.to(x.device))
            numbers, dtype = coded.number[:, None], torch.int32
        if not bool(numbers.isfinite().all()):
            got = float(x.abs().max())
            raise fail(self.stage, "weight", f"within the range of {self.dtype}", got, "Use scale_dtype float32.")
        packed = ops.pack(coded.codes, self.bits)[:, : -(-self.cols * self.bits // 8)]
        return torch.cat([packed, numbers.to(dtype).contiguous().view(torch.uint8)], 1)

    def _finite(self, piece: Tensor) -> Tensor:
        x = piece.float()
        if not bool(x.isfinite().all()):
            raise fail(self.stage, "weight", "finite", "NaN or Inf")
        return x


def _checked(options: dict[str, Any], method: str, stage: str) -> dict[str, Any]:
    """The options, if `method` has them and they are positive numbers."""
    of = methods.fit_books if method == "two-tier" else methods.RANGES.get(method)
    known = [n for n, p in inspect.signature(of).parameters.items() if p.default is not p.empty] if of else []
    known += ["books"] if method == "two-tier" else []
    for name, value in options.items():
        if name not in known:
            raise fail(stage, "options", f"{', '.join(known) or 'none'} for {method}", name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "ratio" and not (isinstance(value, (int, float)) and 0 < value < 1):
            raise fail(stage, name, "above 0 and below 1", value)
        if name != "ratio" and not (whole and value >= (0 if name == "seed" else 1)):
            raise fail(stage, name, "a whole number of at least 1", value)
    return dict(options)


def spread(rows: int, count: int) -> Tensor:
    """The numbers of `count` rows spread evenly over a table, or of all of them; int64."""
    count = min(rows, count)
    return torch.arange(count) * rows // max(count, 1)


def quantize_table(
    weight: Tensor,
    bits: int = 4,
    method: str = "greedy",
    scale_dtype: str | torch.dtype = "float16",
    *,
    stage: str = STAGE,
    **options: Any,
) -> Table:
    """A float table [N, cols] in `bits` bits, on its device; a piece at a time, so that a search needs no second table.

    Arguments and errors: as in quantize_embedding.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.dtype.is_floating_point or not weight.shape[1]:
        got = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise fail(stage, "weight", "a float table [N, cols]", got)
    with torch.no_grad():
        weight = weight.detach()
        pack = Packer(
            tuple(weight.shape),
            lambda count: weight[spread(len(weight), count)],
            bits,
            method,
            scale_dtype,
            options,
            stage,
        )
        rows = torch.cat([pack(piece) for piece in weight.split(pack.pieces)])
    return Table(rows, bits, weight.shape[1], pack.kind, pack.dtype, pack.books)


def pack_table(weight: Tensor, bits: int, scale_dtype: str = "float16", method: str = "asymmetric") -> Tensor:
    """The rows of quantize_table alone, uint8 [N, bytes of a row]; not for two-tier, whose rows need books."""
    if method == "two-tier":
        raise fail("qk.pack_table", "method", "one whose rows stand alone", method, "Use qk.quantize_embedding.")
    return quantize_table(weight, bits, method, scale_dtype, stage="qk.pack_table").rows


def quantize_embedding(
    source: nn.Embedding | nn.EmbeddingBag | Tensor | np.ndarray,
    bits: int = 4,
    method: str = "greedy",
    scale_dtype: str | torch.dtype = "float16",
    **options: Any,
) -> QEmbedding | QEmbeddingBag:
    """The module that looks up in a quantized copy of a table: a QEmbeddingBag for a bag, else a QEmbedding.

    source: a float module, or a table [N, cols]. bits: 2, 4 or 8; kmeans and two-tier 2 or 4. method: symmetric,
    asymmetric, greedy, greedy+, golden, histogram, histogram-brute, kmeans or two-tier (docs/methods/embedding.md).
    scale_dtype: of scale and offset, or of a row's codebook; books of two-tier are float32. options: bins and ratio of
    the greedy walks, bins of the histograms, rounds of golden; books, rounds and seed of two-tier.
    Raises QkError for other arguments, a module with max_norm or of another kind, values that are not finite, and
    values beyond what scale_dtype holds.
    """
    if isinstance(source, nn.Embedding | nn.EmbeddingBag):
        _check_norm(STAGE, source)
        return of_table(quantize_table(source.weight, bits, method, scale_dtype, **options), source)
    if isinstance(source, np.ndarray):
        source = torch.from_numpy(np.array(source))
    if isinstance(source, nn.Module):
        raise fail(STAGE, "source", "an nn.Embedding, nn.EmbeddingBag or a table", type(source).__name__)
    return of_table(quantize_table(source, bits, method, scale_dtype, **options))


def of_table(table: Table, module: nn.Module | None = None, mapped: bool = False) -> QEmbedding | QEmbeddingBag:
    """The module for a table that stands for a float `module`; mapped: without copying the rows."""
    fields = {"kind": table.kind, "dtype": table.dtype, "books": table.books, "mapped": mapped}
    if not isinstance(module, nn.EmbeddingBag):
        return QEmbedding(table.rows, table.bits, table.cols, **fields)
    own = {name: getattr(module, name) for name in ("mode", "include_last_offset", "padding_idx")}
    return QEmbeddingBag(table.rows, table.bits, table.cols, **own, **fields)


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
        mapped: bool = False,
    ) -> None:
        """mapped: rows are kept as they lie, such as in a mapped file; else large ones move to huge pages."""
        super().__init__()
        self.bits, self.cols, self.kind, self.dtype, self.codes_first = bits, cols, kind, dtype, codes_first
        self.register_buffer("rows", rows if mapped else in_huge_pages(rows))
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
        cls, module: nn.EmbeddingBag, bits: int, scale_dtype: str = "float16", method: str = "asymmetric"
    ) -> QEmbeddingBag:
        """From a float module: see `quantize_embedding`."""
        _check_norm(cls.__name__, module)
        return of_table(quantize_table(module.weight, bits, method, scale_dtype), module)

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
        cls, module: nn.Embedding, bits: int, scale_dtype: str = "float16", method: str = "asymmetric"
    ) -> QEmbedding:
        """From a float module: see `quantize_embedding`."""
        _check_norm(cls.__name__, module)
        return of_table(quantize_table(module.weight, bits, method, scale_dtype), module)

    def forward(self, input: Tensor) -> Tensor:
        return self._bags(input.reshape(-1, 1), None).reshape(*input.shape, self.cols)


def _check_norm(stage: str, module: nn.Module) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise fail(stage, "max_norm", "None", module.max_norm, "Renormalize the table before.")
