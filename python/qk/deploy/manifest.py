"""qk.json: what a checkpoint says about itself, and every check that needs neither its tensors nor a model."""

from __future__ import annotations

import json
from dataclasses import field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qk.errors import fail
from qk.ops.embedding_bag import row_bytes
from qk.prepare.points import MOST
from qk.spec import Plan

FORMAT = 1
FILE = "qk.json"
STAGE = "qk.load"

_strict = ConfigDict(extra="forbid", strict=True)
Pair = tuple[int, int]
Size = Annotated[int, Field(ge=1)]
Sha256 = Field(pattern=r"^[0-9a-f]{64}$")
PLACES = ("stride", "padding", "dilation", "groups")  # of a convolution, as its float layer has them
ASK_AGAIN = "The file was cut short or changed: copy it anew, or save the model again with qk.save."


@dataclass(frozen=True, config=_strict)
class LayerConfig:
    """weight_shape: in kernel order, [N, K] or [N, kh, kw, C / groups]. stride to groups are a convolution's.
    extra_rows: of the tail, that are added to channels of the weight. contiguous: how a convolution's output lies."""

    kind: Literal["linear", "conv2d"]
    weight_shape: list[int]
    bias: bool
    stride: Pair | None = None
    padding: Pair | None = None
    dilation: Pair | None = None
    groups: int | None = None
    extra_rows: int = 0
    contiguous: bool = False

    def __post_init__(self) -> None:
        conv = self.kind == "conv2d"
        if len(self.weight_shape) != (4 if conv else 2) or min(self.weight_shape) < 1:
            raise ValueError(f"weight_shape must be {4 if conv else 2} positive sizes for {self.kind}")
        given = [getattr(self, name) for name in PLACES]
        if any((value is not None) != conv for value in given):
            raise ValueError("stride, padding, dilation and groups must be there for conv2d and only there")
        if conv and (min(*self.stride, *self.dilation, self.groups) < 1 or min(self.padding) < 0):
            raise ValueError("stride, dilation and groups must be positive and padding not negative")
        if not 0 <= self.extra_rows <= (MOST - 1) * self.weight_shape[0]:
            raise ValueError(f"extra_rows must be from 0 to {MOST - 1} for each row of the weight")

    def conv_args(self) -> dict[str, Any]:
        """The arguments of QConv2d beyond the weight's shape; none for a linear layer."""
        names = () if self.kind == "linear" else (*PLACES, "contiguous")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, config=_strict)
class TableConfig:
    """An embedding table: its rows, what stands in one, how they are read (`qk.ops.embedding_bag`). method: that made
    them, error: length of their error over that of the float table; where they are known. books: how many of them rows
    share. mode and include_last_offset are a bag's."""

    kind: Literal["embedding", "embedding_bag"]
    rows: Annotated[int, Field(ge=0)]
    cols: Size
    bits: Literal[2, 4, 8]
    row_kind: Literal["affine", "codebook", "shared"]
    dtype: Literal["float16", "bfloat16", "float32"]
    codes_first: bool
    books: Size | None = None
    method: str = ""
    error: float | None = Field(default=None, ge=0)
    padding_idx: int | None = None
    mode: Literal["sum", "mean", "max"] | None = None
    include_last_offset: bool | None = None

    def __post_init__(self) -> None:
        if self.bits == 8 and self.row_kind != "affine":
            raise ValueError(f"bits must be 2 or 4 with row_kind {self.row_kind}")
        if (self.books is not None) != (self.row_kind == "shared"):
            raise ValueError("books must be there for row_kind shared and only there")
        bag = self.kind == "embedding_bag"
        if any((value is not None) != bag for value in (self.mode, self.include_last_offset)):
            raise ValueError("mode and include_last_offset must be there for embedding_bag and only there")
        if self.padding_idx is not None and not -self.rows <= self.padding_idx < self.rows:
            raise ValueError("padding_idx must be a row")

    @property
    def nbytes(self) -> int:
        """Of rows and books."""
        books = 0 if self.books is None else self.books * 2**self.bits * 4
        return self.rows * sum(row_bytes(self.cols, self.bits, self.row_kind, self.dtype)) + books

    def options(self) -> dict[str, Any]:
        """The arguments of QEmbedding or QEmbeddingBag beyond tensors."""
        names = ("bits", "cols", "dtype", "codes_first", "method", "error", "padding_idx")
        names += ("mode", "include_last_offset") if self.kind == "embedding_bag" else ()
        return {name: getattr(self, name) for name in names} | {"kind": self.row_kind}


@dataclass(frozen=True, config=_strict)
class TensorFile:
    """The tensors' file: its name comes from its content, so a new one never overwrites the one in use."""

    bytes: int
    sha256: str = Sha256

    @property
    def name(self) -> str:
        """Of the file in the checkpoint's folder."""
        return f"model-{self.sha256[:16]}.safetensors"


@dataclass(frozen=True, config=_strict)
class Manifest:
    """Fields of qk.json (docs/format.md); `checksum`, over all others, is added when it is written.

    layers: the integer ones. tables: quantized embedding tables. modules: name -> class of every module, integer ones
    included. tied: name of a tensor -> name under which it is stored. joins: module at whose entry a tensor is
    quantized for all that read it -> layers inside that do, by their names from it on. fingerprint, new_biases,
    unclipped: of the float model (qk_info).
    """

    format: int
    qk: str
    torch: str
    tensors: TensorFile
    plan: Plan
    layers: dict[str, LayerConfig]
    folds: dict[str, str]
    kept: dict[str, str]
    links: list[list[str]]
    modules: dict[str, str]
    tied: dict[str, str]
    history: dict[str, dict[str, Any]]
    fingerprint: str
    new_biases: list[str] = field(default_factory=list)
    unclipped: list[str] = field(default_factory=list)
    tables: dict[str, TableConfig] = field(default_factory=dict)
    joins: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if name not in self.plan.layers or self.plan[name].is_float:
                raise ValueError(f"layers names {name}, for which the plan has no widths")
            if layer.extra_rows and self.plan[name].points == 1:
                raise ValueError(f"{name} has extra_rows, for which the plan has no points")
            if self.modules.get(name) != {"linear": "QLinear", "conv2d": "QConv2d"}[layer.kind]:
                raise ValueError(f"layers and modules do not agree on {name}")
        for name, table in self.tables.items():
            kind = {"embedding": "QEmbedding", "embedding_bag": "QEmbeddingBag"}[table.kind]
            if self.modules.get(name) != kind or name in self.layers:
                raise ValueError(f"tables and modules do not agree on {name}")
        if not self.layers and not self.tables:
            raise ValueError("layers must name an integer layer, or tables a table")
        for norm, layer in self.folds.items():
            if self.modules.get(norm) != "Identity" or layer not in self.modules:
                raise ValueError(f"folds names {norm} -> {layer}, which modules does not have")
        for name, readers in self.joins.items():
            unknown = [reader for reader in readers if under(name, reader) not in self.modules]
            if unknown or not readers or name not in self.modules:
                raise ValueError(f"joins names {name} -> {', '.join(readers)}, which modules does not have")
        for name in self.unclipped:
            if self.modules.get(name) != "ReLU":
                raise ValueError(f"unclipped names {name}, which is no ReLU in modules")

    def to_text(self) -> str:
        """What qk.json holds, checksum included."""
        fields = TypeAdapter(Manifest).dump_python(self, mode="json")
        return json.dumps(fields | {"checksum": checksum(fields)}, indent=1) + "\n"


def under(prefix: str, name: str) -> str:
    """The name of what a module of name `prefix` calls `name`."""
    return f"{prefix}.{name}" if prefix else name


def checksum(fields: dict[str, Any]) -> str:
    """sha256 of all fields but `checksum`, as JSON with sorted keys and without spaces."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises QkError for a path without checkpoint, text that is not JSON, a newer format, a field or value that is
    unknown, missing or impossible, or an edited file."""
    path = folder / FILE
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such path"
        raise fail(STAGE, str(folder), "a folder made by qk.save", got)
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "an empty folder"
        raise fail(STAGE, str(path), "there", held, "Give the folder that qk.save wrote.") from None
    except OSError as error:
        raise fail(STAGE, str(path), "readable", error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise fail(STAGE, str(path), "JSON", str(error)[:200], ASK_AGAIN) from error
    if not isinstance(fields, dict):
        raise fail(STAGE, str(path), "a JSON object", type(fields).__name__, ASK_AGAIN)
    version = fields.get("format")
    if type(version) is not int or version < 1:
        raise fail(STAGE, f"{path}: format", f"a number from 1 to {FORMAT}", repr(version), ASK_AGAIN)
    if version > FORMAT:
        raise fail(STAGE, f"{path}: format", f"at most {FORMAT}", version, "A newer qk wrote it: upgrade qk.")
    stored = fields.pop("checksum", None)
    manifest = _parsed(path, fields)
    if stored != checksum(fields):
        raise fail(STAGE, f"{path}: checksum", checksum(fields), repr(stored), ASK_AGAIN)
    return manifest


def _parsed(path: Path, fields: dict[str, Any]) -> Manifest:
    try:
        # As JSON, where a list stands for a tuple; `strict` then refuses "4" for 4.
        return TypeAdapter(Manifest).validate_json(json.dumps(fields))
    except ValidationError as error:
        first, *others = error.errors()
        field = ".".join(map(str, first["loc"])) or "the fields"
        more = f" ({len(others)} more fields are wrong.)" if others else ""
        got = repr(first["input"])[:80]
        raise fail(
            STAGE, f"{path}: {field}", first["msg"][0].lower() + first["msg"][1:], got, ASK_AGAIN + more
        ) from error
    except (ValueError, RecursionError) as error:
        raise fail(STAGE, str(path), "a checkpoint's fields", str(error)[:200], ASK_AGAIN) from error
