"""Embedding tables larger than memory: from a mapped file to a file of packed rows, a piece at a time.

The file is a safetensors one: tensors `rows` and, for two-tier, `books`; how to read them is in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich import progress as rich_progress
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qk.calibrate.table import Packer, Table, rows_at_once, spread
from qk.deploy.embedding import QEmbedding, of_table
from qk.errors import fail
from qk.files import replacing
from qk.ops.embedding_bag import DTYPES, row_bytes

FORMAT = "1"
WRITE, READ = "qk.quantize_table_file", "qk.load_table"
ASK_AGAIN = "Write it again with qk.quantize_table_file."


def quantize_table_file(
    source: Any,
    out: str | Path,
    bits: int = 4,
    method: str = "greedy",
    scale_dtype: str | torch.dtype = "float16",
    *,
    tensor: str | None = None,
    chunk_rows: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Quantizes a table [N, cols] that need not fit into memory, and writes it to `out`. Returns its path.

    source: a .npy file, a .safetensors file with the name of its `tensor` (if it holds more than one), or anything with
    a shape whose slices of rows are arrays, such as a numpy.memmap. chunk_rows: rows in memory at once; by default
    those of 4 million values. two-tier fits its books to 65,536 rows spread over the table, in memory too.
    progress: a bar on a terminal, nothing elsewhere. method, scale_dtype, options: as in quantize_embedding; the bytes
    are the same as there, whatever chunk_rows is.
    `out` is put in place when it is whole: an interrupted run leaves nothing, or the file that was there before.
    Raises QkError for arguments that quantize_embedding refuses, and paths that cannot be read or written.
    """
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise fail(WRITE, "chunk_rows", "a whole number of at least 1", chunk_rows)
    if isinstance(source, str | Path) and Path(source).resolve() == Path(out).resolve():
        raise fail(WRITE, "out", "another file than source", str(out))
    table = _opened(source, tensor)
    shape = tuple(getattr(table, "shape", ()))
    if len(shape) != 2 or shape[1] == 0:
        raise fail(WRITE, "source", "a float table [N, cols]", f"{type(table).__name__} {list(shape)}")
    with torch.no_grad():
        sample = lambda count: _rows(table, spread(shape[0], count))  # noqa: E731
        pack = Packer(shape, sample, bits, method, scale_dtype, options, WRITE)
        step = chunk_rows or rows_at_once(pack.cols)
        try:
            with replacing(out) as file, _bar(shape[0], progress) as advance:
                file.write(_header(shape[0], pack))
                if pack.books is not None:
                    _write(file, pack.books)
                for begin in range(0, shape[0], step):
                    piece = _tensor(table[begin : begin + step])
                    if list(piece.shape) != [min(step, shape[0] - begin), shape[1]]:
                        where = f"rows {begin} to {min(begin + step, shape[0])} of source"
                        expected = f"as many as its shape says, {list(shape)}"
                        raise fail(WRITE, where, expected, f"a piece {list(piece.shape)}")
                    _write(file, pack(piece))
                    advance(len(piece))
                pack.check_size()
        except OSError as error:
            raise fail(WRITE, str(out), "a file that can be written", error.strerror or error) from error
    return Path(out)


def load_table(path: str | Path, mapped: bool = False) -> QEmbedding:
    """The table of quantize_table_file as a module. mapped: rows stay in the file and are read when they are looked up.

    Raises QkError for a file that is not there, is cut short, or is no table.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            fields, names = file.metadata() or {}, set(file.keys())
            shape = file.get_slice("rows").get_shape() if "rows" in names else []
            kind, dtype, bits, cols = _described(path, fields, names, shape)
            books = file.get_tensor("books").clone() if "books" in names else None
            rows = None if mapped else file.get_tensor("rows")
    except (OSError, SafetensorError) as error:
        raise fail(READ, str(path), "a table of qk", error, ASK_AGAIN) from error
    if rows is None:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            offset = 8 + size + json.loads(file.read(size))["rows"]["data_offsets"][0]
        flat = np.memmap(path, np.uint8, "c", offset, tuple(shape)) if shape[0] else np.zeros(shape, np.uint8)
        rows = torch.from_numpy(flat)
    return of_table(Table(rows, bits, cols, kind, dtype, books), mapped=mapped)


def _described(path: Path, fields: dict[str, str], names: set[str], shape: list[int]) -> tuple[str, str, int, int]:
    """kind, dtype, bits and cols of the metadata, which must fit the tensors."""
    if fields.get("qk_table") != FORMAT:
        raise fail(READ, f"{path}: qk_table", FORMAT, fields.get("qk_table"), ASK_AGAIN)
    kind, dtype, bits, cols = (fields.get(name, "") for name in ("kind", "dtype", "bits", "cols"))
    good = kind in ("affine", "codebook", "shared") and dtype in DTYPES and bits in ("2", "4", "8")
    good = good and cols.isascii() and cols.isdigit() and names == {"rows"} | ({"books"} if kind == "shared" else set())
    if not good or len(shape) != 2 or shape[1] != sum(row_bytes(int(cols), int(bits), kind, dtype)):
        raise fail(READ, f"{path}: metadata", "that of its rows", f"{fields} for rows {shape}", ASK_AGAIN)
    return kind, dtype, int(bits), int(cols)


def _opened(source: Any, tensor: str | None) -> Any:
    """What is sliced by rows."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.suffix not in (".npy", ".safetensors"):
        raise fail(WRITE, str(path), "a .npy or .safetensors file", path.suffix or "no ending")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        file = safe_open(path, "pt")
        names = list(file.keys())
    except (OSError, ValueError, SafetensorError) as error:
        raise fail(WRITE, str(path), "a readable .npy or .safetensors file", error) from error
    name = names[0] if tensor is None and len(names) == 1 else tensor
    if name not in names:
        raise fail(WRITE, "tensor", f"one of {', '.join(sorted(names)[:8])}", tensor)
    return _Slice(file.get_slice(name))


class _Slice:
    """A tensor of a safetensors file, with a shape."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.shape = inner, tuple(inner.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        return self.inner[rows]


def _tensor(piece: Any) -> Tensor:
    """A piece of the source in memory."""
    if isinstance(piece, Tensor):
        x = piece
    else:
        array = np.asarray(piece)
        x = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    if x.dim() != 2 or not x.dtype.is_floating_point:
        raise fail(WRITE, "source", "a float table [N, cols]", f"{x.dtype} {list(x.shape)}")
    return x


def _rows(table: Any, numbers: Tensor) -> Tensor:
    """Single rows of the source."""
    if len(numbers) == table.shape[0]:
        return _tensor(table[0 : table.shape[0]])
    return torch.cat([_tensor(table[i : i + 1]) for i in numbers.tolist()])


def _header(rows: int, pack: Packer) -> bytes:
    """The start of the safetensors file: length and JSON, in which every size is known before the first row."""
    fields = {"qk_table": FORMAT, "kind": pack.kind, "dtype": pack.dtype, "bits": pack.bits, "cols": pack.cols}
    fields |= {"method": pack.method}
    entries: dict[str, Any] = {"__metadata__": {name: str(value) for name, value in fields.items()}}
    at = 0
    if pack.books is not None:
        at = pack.books.nbytes
        entries["books"] = {"dtype": "F32", "shape": list(pack.books.shape), "data_offsets": [0, at]}
    shape = [rows, pack.row_bytes]
    entries["rows"] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + rows * pack.row_bytes]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.detach().cpu().contiguous().numpy().data)


@contextmanager
def _bar(rows: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the rows that are done."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda done: None
        return
    columns = ("{task.description}", rich_progress.BarColumn(), rich_progress.MofNCompleteColumn())
    with rich_progress.Progress(*columns, rich_progress.TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("rows", total=rows)
        yield lambda done: bar.update(task, advance=done)
