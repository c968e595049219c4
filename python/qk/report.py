"""What a run did, in figures: each layer with its width, error, size and time, or the reason why it is in float."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from html import escape
from math import inf, isfinite
from pathlib import Path
from typing import Any

from qk import tables
from qk.deploy import table_sqnr
from qk.deploy.embedding import QEmbedding, QEmbeddingBag
from qk.deploy.manifest import TableConfig
from qk.errors import fail
from qk.files import replace_file
from qk.methods.sparq import InputStatistics
from qk.page import figures, page
from qk.tables import Table


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after. None: not measured.

    weights, activations: bits; None for a layer left in float, and `reason` says why. sqnr_db: power of the float
    output over power of the error of the integer one, on calibration data. *_bytes: of the weight (with its steps and
    zeros). *_ms: median time of one call at the shapes that were seen. rows: output channels; extra_rows: what is
    added to some of them (qk.multipoint). widths: as QuantSpec.describe has them, where they are more than two numbers.
    """

    name: str
    kind: str
    weights: int | None = None
    activations: int | None = None
    reason: str = ""
    sqnr_db: float | None = None
    float_bytes: int | None = None
    integer_bytes: int | None = None
    float_ms: float | None = None
    integer_ms: float | None = None
    rows: int | None = None
    extra_rows: int = 0
    widths: str = ""

    @property
    def width(self) -> str:
        """W4A8, W4A8 dynamic, or float; with extra rows what they make of it: W4A8, 64 + 6 rows, 4.4 bits."""
        if self.weights is None:
            return "float"
        width = self.widths or f"W{self.weights}A{self.activations}"
        if not self.extra_rows:
            return width
        bits = self.weights * (1 + self.extra_rows / self.rows)
        return f"{width}, {self.rows} + {self.extra_rows} rows, {bits:.1f} bits"


@dataclass(frozen=True)
class TableReport:
    """One embedding table before and after. sqnr_db: power of its values over power of their error; inf: no error."""

    name: str
    rows: int
    cols: int
    bits: int
    method: str
    sqnr_db: float | None
    float_bytes: int
    integer_bytes: int

    @staticmethod
    def of(name: str, rows: int, table: QEmbedding | QEmbeddingBag | TableConfig) -> TableReport:
        """Of a quantized table, or of what a checkpoint says about one."""
        error = None if table.error is None else table_sqnr(table.error)
        sizes = rows * table.cols * 4, table.nbytes
        return TableReport(name, rows, table.cols, table.bits, table.method, error, *sizes)


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call of the whole model at one batch size, alternating in one process; fused may be missing."""

    batch: int
    float_p50: float
    float_p99: float
    integer_p50: float
    integer_p99: float
    fused_p50: float | None = None
    fused_p99: float | None = None


@dataclass
class Report:
    """accuracy: "float", "simulated", "integer", "fused" -> share of labels met.

    inputs: of layers whose plan has windows (SPARQ).
    losses: unit -> [{"iteration", "loss"}]. size_bytes: "float", "integer" -> bytes on disk. seconds: by stage.
    """

    title: str
    layers: list[LayerReport] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    latency: list[Latency] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    links: list[tuple[str, ...]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    embeddings: list[TableReport] = field(default_factory=list)

    def summary(self) -> Table:
        """The whole model, before and after."""
        rows: list[list[Any]] = []
        if self.accuracy:
            share = {name: self.accuracy.get(name) for name in ("float", "simulated", "integer", "fused")}
            last = share["integer"] if share["fused"] is None else share["fused"]
            change = None
            if share["float"] is not None and last is not None:
                change = f"{100 * (last - share['float']):+.2f} points"
            shown = [tables.percent(share[name]) for name in ("float", "integer", "fused")]
            rows.append(["accuracy (%)", *shown, change])
            rows.append(["accuracy, simulated in float (%)", None, tables.percent(share["simulated"]), None, None])
        if self.size_bytes:
            before, after = self.size_bytes.get("float"), self.size_bytes.get("integer")
            change = f"{before / after:.2f}x smaller" if before and after else None
            rows.append(["size on disk", tables.size(before), tables.size(after), None, change])
        for timing in self.latency:
            for which in ("p50", "p99"):
                times = [getattr(timing, f"{side}_{which}") for side in ("float", "integer", "fused")]
                before, after = times[0], times[1] if times[2] is None else times[2]
                change = f"{before / after:.2f}x faster" if before >= after else f"{after / before:.2f}x slower"
                name = f"latency {which}, batch {timing.batch} (ms)"
                rows.append([name, *(tables.ms(t) for t in times), change])
        headers = ["whole model", "float", "quantized", "fused", "change"]
        if all(row[3] is None for row in rows):
            headers, rows = headers[:3] + headers[4:], [row[:3] + row[4:] for row in rows]
        return Table("", headers, rows)

    def layer_table(self) -> Table:
        """Every layer: width, error, size and time before and after."""
        headers = ["layer", "kind", "width", "SQNR (dB)", "weight", "quantized", "float (ms)", "quantized (ms)"]
        rows = []
        for layer in self.layers:
            error = decibels(layer.sqnr_db)
            sizes = [tables.size(layer.float_bytes), tables.size(layer.integer_bytes)]
            times = [tables.ms(layer.float_ms), tables.ms(layer.integer_ms)]
            rows.append([layer.name, layer.kind, layer.width, error, *sizes, *times])
        return Table("", headers, rows)

    def inputs_table(self) -> Table:
        """Layers whose inputs SPARQ cuts: the window, and the shares that say what it costs."""
        headers = ["input of", "window", "bits", "zeros", "pairs with one 0", "below 16", "wide", "shifts", "SQNR (dB)"]
        rows = []
        for name, x in self.inputs.items():
            shifts = " ".join(f"{s}:{100 * share:.0f}" for s, share in x.shifts.items())
            shares = [tables.percent(share) for share in (x.zeros, x.one_zero, x.small, x.wide)]
            error = None if x.sqnr_db in (None, inf) else f"{x.sqnr_db:.1f}"
            window = x.window if not x.reason else f"whole: {x.reason}"
            rows.append([name, window, f"{x.bits:g}", *shares, shifts, error])
        return Table("", headers, rows)

    def kept_table(self) -> Table:
        """Layers in float and why."""
        return Table("", ["left in float", "why"], [[x.name, x.reason] for x in self.layers if x.weights is None])

    def tables(self) -> list[Table]:
        """What a terminal shows: the model, its layers and tables, what stayed in float, notes."""
        notes = Table("", ["notes"], [[note] for note in self.notes])
        shown = (
            self.summary(),
            self.layer_table(),
            embedding_table(self.embeddings),
            self.inputs_table(),
            self.kept_table(),
            notes,
        )
        return [t for t in shown if t.rows]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite (the error ratio of a layer without error) is None."""
        return plain(asdict(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Report:
        """The report that to_dict was called on, but for what is not finite."""
        data = dict(data)
        data["layers"] = [LayerReport(**x) for x in data.get("layers", [])]
        data["latency"] = [Latency(**x) for x in data.get("latency", [])]
        data["embeddings"] = [TableReport(**x) for x in data.get("embeddings", [])]
        data["links"] = [tuple(x) for x in data.get("links", [])]
        data["inputs"] = {name: InputStatistics.of(x) for name, x in data.get("inputs", {}).items()}
        return Report(**data)

    def section(self) -> str:
        """The report as HTML to put into a page."""
        parts = [self.summary().html() if self.summary().rows else "", figures(self)]
        parts += [f"<h2>Layers</h2>{self.layer_table().html()}" if self.layers else ""]
        if self.embeddings:
            parts.append(f"<h2>Embedding tables</h2>{embedding_table(self.embeddings).html()}")
        if self.inputs:
            parts.append(f"<h2>Inputs cut by SPARQ (shares in %)</h2>{self.inputs_table().html()}")
        if self.kept_table().rows:
            parts.append(f"<h2>Left in float</h2>{self.kept_table().html()}")
        if self.notes:
            parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(n)}</li>" for n in self.notes) + "</ul>")
        facts = {"Time taken (s)": {k: f"{v:.1f}" for k, v in self.seconds.items()}, "Recipe": self.recipe}
        facts |= {"BatchNorms folded into": self.folds, "Machine": self.machine}
        if self.links:
            facts["Layers that read one tensor"] = {str(i + 1): ", ".join(x) for i, x in enumerate(self.links)}
        for name, values in facts.items():
            if values:
                table = Table("", ["", ""], [[k, _text(v)] for k, v in values.items()])
                parts.append(f"<details><summary>{escape(name)}</summary>{table.html()}</details>")
        return "".join(parts)

    def save(self, path: str | Path) -> Path:
        """Writes one self-contained HTML file, or JSON for a name that ends in .json. Returns the path.

        Raises QkError for a place that cannot be written.
        """
        as_json = str(path).endswith(".json")
        content = json.dumps(self.to_dict(), indent=1) if as_json else page(self.title, self.section())
        try:
            return replace_file(path, content.encode())
        except OSError as error:
            raise fail("report", str(path), "a file that can be written", error.strerror or error) from error


def decibels(sqnr_db: float | None) -> str | None:
    """An error ratio as text."""
    return None if sqnr_db is None else "no error" if sqnr_db == inf else f"{sqnr_db:.1f}"


def embedding_table(embeddings: list[TableReport]) -> Table:
    """Every quantized embedding table: width, error, size before and after."""
    headers = ["table", "rows x columns", "bits", "method", "SQNR (dB)", "float", "quantized"]
    rows = []
    for x in embeddings:
        sizes = [tables.size(x.float_bytes), tables.size(x.integer_bytes)]
        rows.append([x.name, f"{x.rows} x {x.cols}", x.bits, x.method, decibels(x.sqnr_db), *sizes])
    return Table("", headers, rows)


def plain(value: Any) -> Any:
    """For JSON: tuples as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
