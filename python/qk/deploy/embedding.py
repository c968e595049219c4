"""Quantized embedding tables: rows of codes with their numbers, and the modules that look them up.

How codes are chosen: qk.calibrate.rows, qk.calibrate.codebooks. Bytes of a row: docs/format.md. Tables beyond
memory: qk.deploy.table_file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qk import ops
from qk.calibrate.table import STAGE, Table, quantize_table
from qk.deploy.modules import by_definition
from qk.deploy.pages import in_huge_pages
from qk.errors import fail
from qk.ops.embedding_bag import embedding, values
from qk.ops.embedding_bag import reference as bags_definition
from qk.prepare.lookup import QuantTable, bag_options

BAG = ("mode", "include_last_offset", "padding_idx")  # what of an EmbeddingBag says how it sums


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
    fields = {name: getattr(table, name) for name in ("rows", "bits", "cols", "kind", "dtype", "books", "method")}
    fields["mapped"] = mapped
    if isinstance(module, nn.EmbeddingBag) or (isinstance(module, QuantTable) and module.is_bag):
        return QEmbeddingBag(**fields, **{name: getattr(module, name) for name in BAG})
    return QEmbedding(**fields, padding_idx=None if module is None else module.padding_idx)


def to_integer_table(table: QuantTable) -> QEmbedding | QEmbeddingBag:
    """The module that looks up as `table` simulates it."""
    spec = table.spec
    form = (spec.bits, table.weight.shape[1], spec.row_kind, spec.scale_dtype)
    books = None if table.books is None else table.books.clone()
    module = of_table(Table(table.rows.clone(), *form, books, spec.method), table)
    module.error = table.error
    return module


def table_modules(model: nn.Module) -> dict[str, QEmbedding | QEmbeddingBag]:
    """Name -> module with a quantized table; of one with several names the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Table)}


class _Table(nn.Module):
    """What QEmbeddingBag and QEmbedding share: rows, and how to read them (see `qk.ops.embedding_bag`).

    method: that made the rows, where it is known; error: length of their error over the length of the float table.
    """

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
        method: str = "",
        error: float | None = None,
        padding_idx: int | None = None,
    ) -> None:
        """mapped: rows are kept as they lie, such as in a mapped file; else large ones move to huge pages."""
        super().__init__()
        self.bits, self.cols, self.kind, self.dtype, self.codes_first = bits, cols, kind, dtype, codes_first
        self.method, self.error, self.padding_idx = method, error, padding_idx
        self.register_buffer("rows", rows if mapped else in_huge_pages(rows))
        self.register_buffer("books", books)
        nothing = torch.zeros(0, 1, dtype=torch.int64, device=rows.device)
        embedding(rows, nothing, **self.form)  # refuses what does not fit

    @property
    def num_embeddings(self) -> int:
        """Rows, as the float module names them."""
        return self.rows.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns, as the float module names them."""
        return self.cols

    @property
    def nbytes(self) -> int:
        """Of rows and books."""
        return self.rows.nbytes + (0 if self.books is None else self.books.nbytes)

    @property
    def form(self) -> dict[str, Any]:
        """How rows are read, as arguments of `qk.ops.embedding_bag`."""
        names = ("bits", "cols", "kind", "dtype", "codes_first", "books")
        return {name: getattr(self, name) for name in names}

    def _bags(self, indices: Tensor, offsets: Tensor | None, **options: Any) -> Tensor:
        look_up = bags_definition if by_definition() else ops.embedding_bag
        return look_up(self.rows, indices, offsets, **self.form, **options)

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
        **options: Any,
    ) -> None:
        """table, options: the arguments of the rows, as in `qk.ops.embedding_bag`: rows, bits, cols, kind, ..."""
        super().__init__(*table, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_float(
        cls, module: nn.EmbeddingBag, bits: int, scale_dtype: str = "float16", method: str = "asymmetric"
    ) -> QEmbeddingBag:
        """From a float module: see `quantize_embedding`."""
        _check_norm(cls.__name__, module)
        return of_table(quantize_table(module.weight, bits, method, scale_dtype), module)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return self._bags(input, offsets, **bag_options(self, offsets, per_sample_weights))


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
        if by_definition():
            return values(self.rows[input.long()], **self.form)
        return embedding(self.rows, input, **self.form)


def _check_norm(stage: str, module: nn.Module) -> None:
    if getattr(module, "max_norm", None) is not None:
        raise fail(stage, "max_norm", "None", module.max_norm, "Renormalize the table before.")
