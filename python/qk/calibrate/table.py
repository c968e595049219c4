"""Embedding tables to packed rows: what calibration makes of them, without data.

How codes are chosen: qk.calibrate.rows, qk.calibrate.codebooks. Bytes of a row: docs/format.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qk import ops
from qk.calibrate import codebooks
from qk.calibrate import rows as methods
from qk.errors import fail
from qk.ops.embedding_bag import DTYPES, row_bytes, values
from qk.options import row_kind
from qk.prepare.lookup import QuantTable

AT_ONCE = 1 << 22  # values of a piece of a table, so that a search needs no second table
SAMPLE = 1 << 16  # rows to which the books of two-tier are fitted
BOOKS = 1024  # of two-tier, at most, unless asked for
SMALLEST = 2.0**-20  # of a table's largest value: float16 holds it to 5 bits, and a fifteenth of it to one
STAGE = "qk.quantize_embedding"


def rows_at_once(cols: int) -> int:
    """Of a piece of a table."""
    return max(1, AT_ONCE // cols)


@dataclass(frozen=True)
class Table:
    """rows uint8 [N, bytes of a row] and how to read them, as `qk.ops.embedding_bag` takes it. method: of them."""

    rows: Tensor
    bits: int
    cols: int
    kind: str = "affine"
    dtype: str = "float16"
    books: Tensor | None = None
    method: str = ""

    @property
    def nbytes(self) -> int:
        """Of rows and books."""
        return self.rows.nbytes + (0 if self.books is None else self.books.nbytes)

    def values(self) -> Tensor:
        """What the rows stand for, float32 [N, cols]."""
        return self._values(self.rows)

    def error(self, weight: Tensor) -> float:
        """Length of the error over the length of the float table, as the paper compares methods; 0 without any."""
        noise, signal, count = 0.0, 0.0, rows_at_once(self.cols)
        for piece, rows in zip(weight.detach().split(count), self.rows.split(count), strict=True):
            noise += (self._values(rows).double() - piece.double()).square().sum().item()
            signal += piece.double().square().sum().item()
        return (noise / signal) ** 0.5 if noise else 0.0

    def _values(self, rows: Tensor) -> Tensor:
        return values(rows, self.bits, self.cols, self.kind, self.dtype, books=self.books)


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
        if not isinstance(bits, int) or bits not in (2, 4, 8):
            raise fail(stage, "bits", "2, 4 or 8", bits)
        dtype = str(scale_dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise fail(stage, "scale_dtype", " or ".join(DTYPES), dtype)
        if method not in methods.METHODS:
            raise fail(stage, "method", " or ".join(methods.METHODS), method)
        if bits == 8 and method not in methods.RANGES:
            raise fail(stage, "bits", f"2 or 4 for {method}", bits, "A book of 256 values a row saves nothing.")
        self.stage, self.bits, self.cols, self.method, self.dtype = stage, bits, shape[1], method, dtype
        self.kind = row_kind(method)
        self.options = _checked(options, method, stage)
        self.largest = 0.0  # of the values seen
        self.middles = self.books = None
        if method == "two-tier":
            count = self.options.pop("books", None) or max(1, min(shape[0] // 32, BOOKS))
            rows = self._finite(sample(SAMPLE))
            if len(rows):
                self.middles, self.books = codebooks.fit_books(rows, bits, count, **self.options)
            else:
                self.middles, self.books = rows.new_zeros(1, self.cols), rows.new_zeros(1, 2**bits)

    @property
    def row_bytes(self) -> int:
        """Of a packed row."""
        return sum(row_bytes(self.cols, self.bits, self.kind, self.dtype))

    def __call__(self, piece: Tensor) -> Tensor:
        """Packed rows uint8 [n, row_bytes]. Raises QkError for values that are not finite or beyond dtype."""
        x, dtype = self._finite(piece), DTYPES[self.dtype]
        if len(x) == 0:
            return torch.zeros(0, self.row_bytes, dtype=torch.uint8, device=x.device)
        self.largest = max(self.largest, float(x.abs().max()))
        if self.kind == "affine":
            coded = methods.by_range(x, self.bits, dtype, self.method, **self.options)
            numbers = torch.stack([coded.scale, coded.offset], 1)
        elif self.kind == "codebook":
            coded = codebooks.kmeans(x, self.bits, dtype)
            numbers = coded.books
        else:
            coded = codebooks.two_tier(x, self.middles.to(x.device), self.books.to(x.device))
            numbers, dtype = coded.number[:, None], torch.int32
        if not bool(numbers.isfinite().all()):
            got = float(x.abs().max())
            raise fail(self.stage, "weight", f"within the range of {self.dtype}", got, "Use scale_dtype float32.")
        packed = ops.pack(coded.codes, self.bits)[:, : -(-self.cols * self.bits // 8)]
        return torch.cat([packed, numbers.to(dtype).contiguous().view(torch.uint8)], 1)

    def check_size(self) -> None:
        """After the last piece. Raises QkError where all values are too small for numbers of the rows' dtype."""
        if self.dtype == "float16" and self.kind != "shared" and 0 < self.largest < SMALLEST:
            expected = f"with a value of at least {SMALLEST:.1g} for scales of float16"
            raise fail(self.stage, "weight", expected, f"{self.largest:.1g} at most", "Use scale_dtype bfloat16.")

    def _finite(self, piece: Tensor) -> Tensor:
        x = piece.float()
        if not bool(x.isfinite().all()):
            raise fail(self.stage, "weight", "finite", "NaN or Inf")
        return x


def _checked(options: dict[str, Any], method: str, stage: str) -> dict[str, Any]:
    """The options, if `method` has them and they are positive numbers."""
    of = codebooks.fit_books if method == "two-tier" else methods.RANGES.get(method)
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
        rows = torch.cat([pack(piece) for piece in weight.split(rows_at_once(pack.cols))])
        pack.check_size()
    return Table(rows, bits, weight.shape[1], pack.kind, pack.dtype, pack.books, method)


def quantized_rows(name: str, module: QuantTable, stage: str) -> tuple[Table, float]:
    """The table of a prepared model as its spec says, and its error. Raises QkError, with its name, as
    quantize_embedding does."""
    spec, weight = module.spec, module.weight
    where = f"{stage}: table {name or 'of the model'}"
    table = quantize_table(weight, spec.bits, spec.method, spec.scale_dtype, stage=where)
    return table, table.error(weight)
