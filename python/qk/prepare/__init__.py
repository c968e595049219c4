"""prepare: a float model becomes a copy with quantizers in place, by watching it run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qk.errors import fail
from qk.prepare.apply import apply_plan, leave_in_float, put
from qk.prepare.blocks import find_stages, find_units
from qk.prepare.fold import fold_batchnorms
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.joins import find_joins, place
from qk.prepare.links import find_links
from qk.prepare.lookup import QuantTable
from qk.prepare.observe import Observation, observe
from qk.prepare.paths import find_paths
from qk.prepare.plan import plan_from
from qk.prepare.prepared import Layer, Prepared, Unit
from qk.prepare.source import STAGE, check_example, check_model, copy_of, run
from qk.prepare.support import sort_modules
from qk.prepare.tables import find_tables
from qk.spec import Plan, Recipe, checked_recipe, float_spec

__all__ = [
    "ActQuantizer",
    "Layer",
    "Prepared",
    "QuantLayer",
    "QuantTable",
    "Unit",
    "apply_plan",
    "leave_in_float",
    "prepare",
]

PASSED_BY = "the model calls it through another reference, so that a replaced layer would be passed by"


def prepare(
    model: nn.Module, example: Any, recipe: Recipe | None = None, *, blocks: Sequence[str] | None = None
) -> Prepared:
    """A copy of `model` with BatchNorm folded and a quantizer in front of each layer that `recipe` quantizes, and its
    embedding tables where the recipe asks for them.

    model: float32, on cpu or cuda, in either mode; it is not changed. example: one small batch: a tensor, a tuple or
    list of positional arguments or a dict of keyword arguments. The model runs on it twice, without gradients, and
    nothing is traced. blocks: names of the modules to reconstruct together, instead of those found. The result computes
    in float until it is calibrated and its layers are switched on.
    Raises QkError for an example that is empty, not finite or not accepted by the model, a model that is wrapped, lazy
    or on another device, a recipe that fits no layer, and when there is nothing to quantize.
    """
    recipe = checked_recipe(recipe, STAGE)
    check_model(model)
    check_example(example)
    copied = copy_of(model)
    seen = observe(copied, example)
    layers, kept = sort_modules(copied, seen)
    tables, in_float = find_tables(copied, seen, recipe)
    kept = {name: reason for name, reason in kept.items() if name not in tables} | in_float
    if not layers and not tables:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(kept.items())[:5])
        advice = "model.float() gives it float32 weights." if "float32" in reasons else ""
        what = "Conv2d or Linear" if recipe.embeddings is None else "Conv2d, Linear or embedding table"
        expected = f"one with a {what} that can be quantized"
        raise fail(STAGE, "model", expected, reasons or "none with weights", advice)
    folds, unfolded = fold_batchnorms(copied, seen, layers)
    kept = {name: unfolded.get(name, reason) for name, reason in kept.items() if name not in folds}
    links = find_links(seen, layers)
    paths, blocked = find_paths(copied, seen, layers, folds)
    units = find_units(copied, seen, layers, blocks)
    p = Prepared(
        model=copied,
        layers=layers,
        units=[],
        links=links,
        folds=folds,
        kept=kept,
        plan=plan_from(recipe, layers, links, [*kept, *tables], bool(tables)),
        all_units=units,
        all_stages=find_stages(seen, layers, units),
        paths=paths,
        blocked=blocked,
        originals={name: copied.get_submodule(name) for name in layers},
        tables=tables,
    )
    if recipe.additions == "quantized":
        p.joins = find_joins(seen, layers)
        place(copied, p.joins)
    floats = {name: copied.get_submodule(name) for name in tables}
    for name, module in floats.items():
        put(p, name, QuantTable(module, tables[name]))
    apply_plan(p, p.plan)
    _keep_what_is_passed_by(p, example, seen, floats)
    return p


def _keep_what_is_passed_by(p: Prepared, example: Any, seen: Observation, floats: dict[str, nn.Module]) -> None:
    """Runs the result once: what the model still reaches on another way than its name stays in float, be it a layer or
    a table, of which `floats` has the float modules."""
    ran: Counter[str] = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda _layer, _args, name=name: ran.update([name]))
        for name, layer in {**p.quant_layers(), **p.quant_tables()}.items()
    ]
    try:
        with torch.no_grad():
            run(p.model, example)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in p.tables if ran[name] < len(seen.calls[name])]
    for name in missed:
        put(p, name, floats[name])
        del p.tables[name]
        p.kept[name] = PASSED_BY
    passed_by = [name for name in p.quant_layers() if ran[name] < p.layers[name].calls]
    if passed_by or missed:
        apply_plan(p, Plan(p.plan.layers | dict.fromkeys(passed_by, float_spec(PASSED_BY))))
