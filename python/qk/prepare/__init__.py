"""prepare: a float model becomes a copy with quantizers in place, by watching it run once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from qk.errors import QkError, fail
from qk.prepare.apply import apply_plan, leave_in_float, put
from qk.prepare.blocks import find_alone, find_stages, find_units
from qk.prepare.fold import fold_batchnorms
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.joins import find_joins, place
from qk.prepare.layouts import find_contiguous
from qk.prepare.links import find_links
from qk.prepare.lookup import QuantTable
from qk.prepare.observe import Observation, observe
from qk.prepare.paths import find_paths
from qk.prepare.plan import plan_from
from qk.prepare.prepared import Layer, Prepared, Unit
from qk.prepare.projections import project, projectable
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

ASKED = "the model asks for its {} outside of its calls, which a replaced layer would not have"
PASSED_BY = "the model calls it through another reference, so that a replaced layer would be passed by"


def prepare(
    model: nn.Module, example: Any, recipe: Recipe | None = None, *, blocks: Sequence[str] | None = None
) -> Prepared:
    """A copy of `model` with BatchNorm folded, layers for the projections of each nn.MultiheadAttention, and
    a quantizer in front of each layer that `recipe` quantizes, and its embedding tables where the recipe asks for them.

    model: float32, on cpu or cuda, in either mode; it is not changed. example: one small batch: a tensor, a tuple or
    list of positional arguments or a dict of keyword arguments. The model runs on it a few times, without gradients,
    and nothing is traced. blocks: names of the modules to reconstruct together, instead of those found. The result
    computes in float until it is calibrated and its layers are switched on.
    Raises QkError for an example that is empty, not finite or not accepted by the model, a model that is wrapped, lazy
    or on another device, a recipe that fits no layer, and when there is nothing to quantize.
    """
    recipe = checked_recipe(recipe, STAGE)
    check_model(model)
    check_example(example)
    copied, seen = _observed(model, example)
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
    alone = find_alone(copied, seen, layers, folds)
    units = find_units(copied, seen, layers, alone, blocks)
    p = Prepared(
        model=copied,
        layers=layers,
        units=[],
        links=links,
        folds=folds,
        kept=kept,
        plan=plan_from(recipe, layers, links, [*kept, *tables], bool(tables)),
        all_units=units,
        alone=alone,
        all_stages=find_stages(seen, layers, units),
        paths=paths,
        blocked=blocked,
        originals={name: copied.get_submodule(name) for name in layers},
        tables=tables,
    )
    if recipe.additions == "quantized":
        p.joins = find_joins(copied, seen, layers)
        place(copied, p.joins)
    floats = {name: copied.get_submodule(name) for name in tables}
    for name, module in floats.items():
        put(p, name, QuantTable(module, tables[name]))
    apply_plan(p, p.plan)
    _keep_what_is_passed_by(p, example, seen, floats)
    convolutions = {name: copied.get_submodule(name) for name, layer in layers.items() if layer.kind == "conv2d"}
    p.contiguous = find_contiguous(copied, convolutions, example)
    return p


def _observed(model: nn.Module, example: Any) -> tuple[nn.Module, Observation]:
    """A copy and what was seen of it: with projections of its attentions, unless the model asks these for what
    projections lack."""
    copied = copy_of(model)
    if names := projectable(copied):
        try:
            copied = project(copied, names)
            return copied, observe(copied, example)
        except QkError:
            copied = copy_of(model)
    return copied, observe(copied, example)


def _keep_what_is_passed_by(p: Prepared, example: Any, seen: Observation, floats: dict[str, nn.Module]) -> None:
    """Runs the result once: what the model still reaches on another way than its name stays in float, and that of which
    it asks for the weight, or for what a class of its own adds, outside of its calls, be it a layer or a table, of
    which `floats` has the float modules."""
    ran: Counter[str] = Counter()
    asked: dict[str, str] = {}
    watched = {**p.quant_layers(), **p.quant_tables()}
    originals = {**p.originals, **floats}
    with ExitStack() as stack, torch.no_grad():
        for name, module in watched.items():
            stack.enter_context(_watched(name, module, originals[name], ran, asked))
        run(p.model, example)
    calls = {name: p.layers[name].calls if name in p.layers else len(seen.calls[name]) for name in watched}
    reasons = {name: PASSED_BY for name in watched if ran[name] < calls[name]}
    reasons = {name: ASKED.format(attribute) for name, attribute in asked.items()} | reasons
    for name in reasons.keys() & p.tables.keys():
        put(p, name, floats[name])
        del p.tables[name]
        p.kept[name] = reasons[name]
    if reasons:
        in_float = {name: float_spec(reason) for name, reason in reasons.items() if name in p.layers}
        apply_plan(p, Plan(p.plan.layers | in_float))


@contextmanager
def _watched(
    name: str, module: nn.Module, original: nn.Module, ran: Counter[str], asked: dict[str, str]
) -> Iterator[None]:
    """Counts the calls of a module, and notes what it is asked for outside of them that only the original has, for a
    while."""
    kind, depth = type(module), 0

    class Watched(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            ran[name] += 1
            depth += 1
            try:
                return super().__call__(*args, **kwargs)
            finally:
                depth -= 1

        def __getattr__(self, attribute: str) -> Any:
            try:
                found = super().__getattr__(attribute)
                is_lost = attribute == "weight"
            except AttributeError:
                if depth or not hasattr(original, attribute):
                    raise
                found, is_lost = getattr(original, attribute), True
            if is_lost and depth == 0:
                asked[name] = attribute
            return found

    module.__class__ = Watched
    try:
        yield
    finally:
        module.__class__ = kind
