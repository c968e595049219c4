"""What a model holds, before or after: layers, widths, sizes, links, blocks."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from qk import sources, tables
from qk.deploy import checkpoint_bytes
from qk.deploy.manifest import read_manifest
from qk.errors import fail
from qk.ops.pack import row_bytes
from qk.prepare import Prepared, prepare
from qk.prepare.tables import packed_bytes
from qk.report import TableReport, embedding_table, plain
from qk.spec import Recipe
from qk.tables import Table
from qk.words import shape_of


def of_model(
    source: str, weights: Path | None, data: str | None, shape: str | None, recipe: Recipe
) -> tuple[dict[str, Any], list[Table]]:
    """The model as the recipe would quantize it."""
    if (data is None) == (shape is None):
        raise fail("inspect", "the example", "given by --data or --shape", "both" if data else "neither")
    model = sources.load_model(source, weights)
    example = sources.load_data(data, 2).calibration[0] if data else torch.randn(shape_of("inspect", shape))
    return described(prepare(model, example, recipe))


def described(p: Prepared) -> tuple[dict[str, Any], list[Table]]:
    """What prepare found: facts for JSON, tables to show."""
    unit_of = {layer: unit.name for unit in p.units for layer in unit.layers}
    layers = [
        {
            "name": name,
            "kind": layer.kind,
            "width": p.plan[name].describe(),
            "weight": list(layer.weight_shape),
            "macs": layer.macs,
            "unit": unit_of.get(name, ""),
        }
        for name, layer in p.layers.items()
    ]
    found = []
    for name, spec in p.tables.items():
        rows, cols = p.quant_tables()[name].weight.shape
        sizes = (rows * cols * 4, packed_bytes(spec, rows, cols))
        found.append(TableReport(name, rows, cols, spec.bits, spec.method, None, *sizes))
    facts = {
        "layers": layers,
        "tables": [asdict(x) for x in found],
        "blocks": {unit.name: list(unit.layers) for unit in p.blocks},
        "links": [list(link) for link in p.links],
        "folds": p.folds,
        "kept": p.kept,
    }
    headers = ["layer", "kind", "width", "weight", "MACs", "unit"]
    rows = [
        [x["name"], x["kind"], x["width"], "x".join(map(str, x["weight"])), f"{x['macs']:,}", x["unit"]] for x in layers
    ]
    shown = [
        Table("", headers, rows),
        embedding_table(found),
        Table("", ["layers that read one tensor"], [[", ".join(link)] for link in p.links]),
        Table("", ["BatchNorm", "folded into"], [list(pair) for pair in p.folds.items()]),
        Table("", ["left in float", "why"], [list(pair) for pair in p.kept.items()]),
    ]
    return facts, [table for table in shown if table.rows]


def of_checkpoint(folder: Path) -> tuple[dict[str, Any], list[Table]]:
    """What qk.json says; it is validated, the tensors are not read."""
    manifest = read_manifest(folder)
    layers = []
    for name, spec in manifest.plan.layers.items():
        config = manifest.layers.get(name)
        shape = config.weight_shape if config else None
        extra = config.extra_rows if config else 0
        packed = None if shape is None else (shape[0] + extra) * row_bytes(prod(shape[1:]), spec.storage_bits)
        width = spec.describe() + (f", {shape[0]} + {extra} rows" if extra else "")
        layers.append({"name": name, "kind": config and config.kind, "width": width, "weight": shape})
        layers[-1] |= {"bytes": packed, "reason": spec.reason}
    found = [TableReport.of(name, config.rows, config) for name, config in manifest.tables.items()]
    facts = {
        "format": manifest.format,
        "written by": {"qk": manifest.qk, "torch": manifest.torch},
        "bytes": checkpoint_bytes(folder),
        "layers": layers,
        "tables": plain([asdict(x) for x in found]),
        "links": manifest.links,
        "folds": manifest.folds,
        "kept": manifest.kept,
        "history": manifest.history,
    }
    about = [["format", manifest.format], ["written by qk", manifest.qk], ["with torch", manifest.torch]]
    about.append(["on disk", tables.size(facts["bytes"])])
    rows = [
        [x["name"], x["kind"], x["width"], "x".join(map(str, x["weight"] or [])), tables.size(x["bytes"])]
        for x in layers
    ]
    learned = [
        [unit, h.get("iterations"), f"{h['first_loss']:.4g}", f"{h['last_loss']:.4g}"]
        for unit, h in manifest.history.items()
        if h.get("first_loss") is not None and h.get("last_loss") is not None
    ]
    shown = [
        Table("", ["checkpoint", str(folder)], about),
        Table("", ["layer", "kind", "width", "weight (kernel order)", "packed"], rows),
        embedding_table(found),
        Table("", ["layers that read one tensor"], [[", ".join(link)] for link in manifest.links]),
        Table("", ["left in float", "why"], [list(pair) for pair in manifest.kept.items()]),
        Table("", ["learned unit", "iterations", "first loss", "last loss"], learned),
    ]
    return facts, [table for table in shown if table.rows]
