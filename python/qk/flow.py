"""The whole flow on one screen: prepare, calibrate, reconstruct, convert, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qk import machine, timing
from qk.calibrate import calibrate
from qk.calibrate.batches import hold
from qk.deploy import checkpoint_bytes, convert, float_bytes, measure_layers, save
from qk.methods import reconstruct
from qk.prepare import Prepared, prepare
from qk.report import Latency, LayerReport, Report
from qk.spec import Plan, Recipe

MEASURED_BATCHES = 2  # for the error of each layer


@dataclass(frozen=True)
class Result:
    """model: integer layers in place, runs torch.ops.qk. prepared: the model that simulates it in float."""

    model: nn.Module
    plan: Plan
    report: Report
    prepared: Prepared


def quantize(
    model: nn.Module,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    example: Any = None,
    blocks: list[str] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    out: str | Path | None = None,
    latency_batches: tuple[int, ...] = (1,),
    measure: bool = True,
    progress: bool = True,
    title: str = "",
) -> Result:
    """A quantized copy of `model`, and what that changed, measured on this machine. `model` itself stays as it is.

    batches: calibration inputs (tensors, tuples of positional arguments or dicts of keywords), without labels. What is
    not a list is read once and held, up to recipe.memory_mb. example: one batch to watch the model on; the first of
    batches if not given. blocks: module names to reconstruct together instead of those found.
    evaluate: model -> share of labels met, in [0, 1]; called on the float, the simulated and the integer model.
    out: folder to save the checkpoint in. latency_batches: sizes at which the whole model is timed, with the example
    repeated or cut along its first axis. measure: False leaves out errors and times of layers, and latency.
    Raises QkError for input that a stage cannot work with, before that stage changes anything.
    """
    recipe = recipe or Recipe()
    seconds: dict[str, float] = {}
    held = hold(batches, "qk.quantize", None, recipe.memory_mb)
    example = held[0] if example is None else example
    with _timed(seconds, "prepare"):
        p = prepare(model, example, recipe, blocks=blocks)
    with _timed(seconds, "calibrate"):
        calibrate(p, held, ranges=recipe.ranges)
    if recipe.method == "brecq":
        with _timed(seconds, "reconstruct"):
            reconstruct(p, held, recipe, progress="auto" if progress else "off")
    with _timed(seconds, "convert"):
        integer = convert(p)
    report = Report(
        title=f"{title or type(model).__name__}: {_widths(p.plan)}, {recipe.method}",
        seconds=seconds,
        losses={unit: [{"iteration": s["iteration"], "loss": s["loss"]} for s in h] for unit, h in p.history.items()},
        folds=dict(p.folds),
        links=list(p.links),
        recipe=recipe.to_dict(),
        machine=machine.fingerprint(),
    )
    report.size_bytes["float"] = float_bytes(model)
    if out is not None:
        report.size_bytes["integer"] = checkpoint_bytes(save(integer, out))
    if evaluate is not None:
        with _timed(seconds, "evaluate"):
            report.accuracy = _accuracies(model, p, integer, evaluate)
    with _timed(seconds, "measure"):
        report.layers = _layers(p, integer, held if measure else None)
        if measure:
            report.latency = [latency(model, integer, example, n) for n in latency_batches]
    return Result(integer, p.plan, report, p)


def latency(floating: nn.Module, integer: nn.Module, example: Any, batch: int, seconds: float = 1.0) -> Latency:
    """Both models on the example, repeated or cut to `batch`; alternating for about `seconds`."""
    inputs = resized(example, batch)
    with _evaluating(floating), torch.inference_mode():
        times = timing.alternate([lambda: _call(floating, inputs), lambda: _call(integer, inputs)], seconds)
    return Latency(batch, *(timing.quantile(side, share) for side in times for share in (0.5, 0.99)))


def resized(example: Any, batch: int) -> Any:
    """Every tensor of the example repeated or cut to `batch` along its first axis."""

    def one(x: Tensor) -> Tensor:
        return x[torch.arange(batch, device=x.device) % x.shape[0]] if x.dim() else x

    return tree_map_only(Tensor, one, dict(example) if isinstance(example, Mapping) else example)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _accuracies(
    model: nn.Module, p: Prepared, integer: nn.Module, evaluate: Callable[[nn.Module], float]
) -> dict[str, float]:
    with _evaluating(model):
        found = {"float": float(evaluate(model))}
    with p.quantized() as simulated:
        found["simulated"] = float(evaluate(simulated))
    return found | {"integer": float(evaluate(integer))}


def _layers(p: Prepared, integer: nn.Module, batches: list[Any] | None) -> list[LayerReport]:
    """Every layer that prepare found, then every other module with weights and why it stays in float."""
    measured = {}
    if batches is not None:
        measured = {m.name: m for m in measure_layers(p, integer, batches[:MEASURED_BATCHES])}
    rows = []
    for name, layer in p.layers.items():
        spec, m = p.plan[name], measured.get(name)
        values = (m.sqnr_db, m.float_bytes, m.integer_bytes, m.float_ms, m.integer_ms) if m else ()
        rows.append(LayerReport(name, layer.kind, spec.weights, spec.activations, spec.reason, *values))
    others = [name for name in p.kept if name not in p.layers]
    return rows + [LayerReport(n, type(p.model.get_submodule(n)).__name__, reason=p.kept[n]) for n in others]


def _widths(plan: Plan) -> str:
    """The commonest width of the plan."""
    names = [spec.describe() for spec in plan.layers.values() if not spec.is_float]
    return max(sorted(set(names)), key=names.count)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; every module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
