"""The whole flow on one screen: prepare, calibrate, reconstruct or tune, convert, save, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qk import machine, timing
from qk.calibrate import calibrate, correct_bias, match_statistics
from qk.calibrate.batches import hold
from qk.calibrate.smooth import smooth
from qk.calibrate.statistics import matched_layers
from qk.deploy import (
    FusedModel,
    LayerMeasure,
    all_layer_times,
    check_state,
    checkpoint_bytes,
    convert,
    file_bytes,
    fuse,
    measure_layers,
    save,
    table_modules,
)
from qk.deploy.modules import integer_layers
from qk.errors import QkError, fail
from qk.files import writable_folder
from qk.inputs import copied_to, device_of, evaluating, feed, resized
from qk.methods import (
    choose_windows,
    input_statistics,
    multipoint,
    overhead,
    reconstruct,
    resume,
    training_file,
    tune,
)
from qk.methods.gptq import gptq
from qk.methods.tune import Loss, Score
from qk.prepare import Prepared, apply_plan, leave_in_float, prepare
from qk.prepare.equalize import equalize
from qk.prepare.joins import working
from qk.prepare.unclip import unclip
from qk.report import Latency, LayerReport, Report, TableReport
from qk.spec import Plan, Recipe, checked_recipe

DEFAULT_BATCHES = (1,)  # at which the whole model is timed
STAGE = "qk.quantize"
MEASURED_BATCHES = 2  # for the error of each layer, and of each window in it
UNFINISHED = "unfinished"  # folder inside `out` for what a run has learned so far


@dataclass(frozen=True)
class Result:
    """model: integer layers in place, runs torch.ops.qk. prepared: what simulates it in float. fused: the fast
    one, or None where it could not be made or was not wanted; report.notes has the reason."""

    model: nn.Module
    plan: Plan
    report: Report
    prepared: Prepared
    fused: FusedModel | None = None


def quantize(
    model: nn.Module,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    example: Any = None,
    blocks: list[str] | None = None,
    labels: Iterable[Tensor] | None = None,
    train: Iterable | None = None,
    loss: Loss | None = None,
    validate: Score | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    out: str | Path | None = None,
    latency_batches: tuple[int, ...] | None = None,
    measure: bool = True,
    fused: bool = True,
    progress: bool = True,
    title: str = "",
) -> Result:
    """A quantized copy of `model`, and what that changed, measured on this machine. `model` itself stays as it is.

    batches: calibration inputs (tensors, tuples of positional arguments or dicts of keywords), without labels. What is
    not a list is read once and held, up to recipe.memory_mb. plan: the width of every layer, as of qk.search, in place
    of those that the recipe gives. example: one batch to watch the model on; the first of batches if not given. blocks:
    module names to reconstruct together instead of those found.
    labels: for ranges "lapq", the classes of each batch, as qk.calibrate takes them.
    train, loss, validate: for method "lsq", labelled data and what to do with it, as qk.tune takes them.
    evaluate: model -> share of labels met, in [0, 1]; called on the float, the simulated and the integer model.
    out: folder to save the checkpoint in. Until all is done, what was learned lies in out/unfinished: the same call
    goes on there after it was killed, to the same bits, and another one is refused. latency_batches: sizes at which the
    whole model is timed, with the example repeated or cut along its first axis; () for none; None for 1, where the
    model takes it. measure: False leaves out errors and times of layers, and latency. fused: False leaves
    out qk.fuse, whose model holds weights of its own.
    Raises QkError for input that a stage cannot work with, before that stage changes anything; whatever can be checked
    without learning is checked before it.
    """
    recipe = checked_recipe(recipe, STAGE)
    if plan is not None and not isinstance(plan, Plan):
        raise fail(STAGE, "plan", "a qk.Plan", type(plan).__name__, "qk.Plan.from_dict makes one of what a file holds.")
    if evaluate is not None and not callable(evaluate):
        raise fail(STAGE, "evaluate", "a function of a model", type(evaluate).__name__)
    if labels is not None and recipe.ranges != "lapq":
        raise fail(STAGE, "labels", "left out, as only ranges 'lapq' look at them", f"some with {recipe.ranges!r}")
    _check_training(recipe, {"train": train, "loss": loss, "validate": validate})
    if out is not None:
        writable_folder(out, STAGE)
    seconds: dict[str, float] = {}
    held = hold(batches, STAGE, None, recipe.memory_mb)
    example = held[0] if example is None else example
    with _timed(seconds, "prepare"):
        p = prepare(model, example, recipe, blocks=blocks)
        if plan is not None:
            apply_plan(p, plan)
    learns = bool(p.quant_layers())  # a model may have tables alone to quantize, which have nothing to learn
    if recipe.match_statistics and learns:
        matched_layers(p)
    if recipe.method == "lsq" and not learns:
        got = "a model whose embedding tables alone are quantized"
        raise fail(STAGE, "method", "another than lsq, which trains layers", got, "They need none: take nearest.")
    several = [name for name, spec in p.plan.layers.items() if spec.points > 1]
    if several and recipe.method == "lsq":
        got = f"more for {', '.join(several[:5])}"
        raise fail(STAGE, "points", "1 with the method lsq, which trains one row for each channel", got)
    if out is not None:
        check_state(model, STAGE)
    sizes, untimed = DEFAULT_BATCHES if latency_batches is None else latency_batches, []
    if measure:
        try:
            _check_batches(p.model, example, sizes)
        except QkError as error:
            if latency_batches is not None:
                raise
            sizes, untimed = (), [f"The whole model is not timed: {error}"]
    report = Report(
        title=f"{title or type(model).__name__}: {_widths(p, recipe.method)}",
        seconds=seconds,
        size_bytes={"float": file_bytes(model)},
        folds=dict(p.folds),
        links=list(p.links),
        recipe=recipe.to_dict(),
        machine=machine.fingerprint(),
    )
    with _timed(seconds, "scale channels"):
        scaled = _scale_channels(p, held, recipe)
    if evaluate is not None:  # now, so that an evaluation that fails costs no learning
        with _timed(seconds, "evaluate"), evaluating(model):
            report.accuracy["float"] = share_met(evaluate, model)
    with _timed(seconds, "calibrate"):
        search = {"labels": labels, "seed": recipe.seed, "memory_mb": recipe.memory_mb}
        calibrate(p, held, recipe.ranges, **search, progress="auto" if progress else "off")
    error, budget = recipe.points_error, recipe.points_budget
    if learns and (several or error is not None or budget is not None):
        with _timed(seconds, "choose points"):
            multipoint(p, held, error=error, budget=budget, cost=recipe.points_cost, memory_mb=recipe.memory_mb)
    if learns and recipe.sparq_bits is not None:
        with _timed(seconds, "choose windows"):
            choose_windows(p, held[:MEASURED_BATCHES], recipe.sparq_bits)
    if recipe.only_faster and learns:
        with _timed(seconds, "time layers"):
            _leave_slower_in_float(p)
    folder = None if out is None else Path(out) / UNFINISHED
    shown = "auto" if progress else "off"
    if recipe.method in ("brecq", "gptq") and learns:
        learn = reconstruct if recipe.method == "brecq" else gptq
        with _timed(seconds, "reconstruct"):
            learn(p, held, recipe, progress=shown, folder=folder)
    if recipe.method == "lsq":
        with _timed(seconds, "tune"):
            tune(p, train, recipe, loss=loss, validate=validate, folder=folder, progress=shown)
    if recipe.match_statistics and learns:
        with _timed(seconds, "match statistics"):
            match_statistics(p, held)
    if recipe.bias_correction and learns:
        with _timed(seconds, "correct biases"):
            correct_bias(p, held)
    with _timed(seconds, "convert"):
        integer = convert(p)
    report.size_bytes["integer"] = file_bytes(integer) if out is None else checkpoint_bytes(save(integer, out))
    fast = None
    if fused:
        with _timed(seconds, "fuse"):
            fast, left = _fused(integer, example, held)
    if evaluate is not None:
        with _timed(seconds, "evaluate"):
            with p.quantized() as simulated:
                report.accuracy["simulated"] = share_met(evaluate, simulated)
            report.accuracy["integer"] = share_met(evaluate, integer)
            if fast is not None:
                report.accuracy["fused"] = share_met(evaluate, fast)
    with _timed(seconds, "measure"):
        measured = measure_layers(p, integer, held[:MEASURED_BATCHES]) if measure else []
        report.latency = [latency(model, integer, example, n, fast) for n in sizes] if measure else []
    report.inputs = input_statistics(p, held[:MEASURED_BATCHES])
    report.losses = {  # without the last entry, which is of another kind: over all data, with weights rounded
        unit: [{"iteration": s["iteration"], "loss": s["loss"]} for s in h[:-1]] for unit, h in p.history.items()
    }
    report.layers, report.embeddings = _layers(p, measured), _tables(integer)
    report.notes = (
        untimed + scaled + _static(p, recipe) + _joined(p, recipe) + _notes(p, measured) + (left if fused else [])
    )
    if recipe.method in ("brecq", "gptq") and out is not None:  # else it may hold another run's
        resume.remove(folder)
    if recipe.method == "lsq" and out is not None:
        training_file.remove(folder)
    return Result(integer, p.plan, report, p, fast)


def latency(
    floating: nn.Module,
    integer: nn.Module,
    example: Any,
    batch: int,
    fused: nn.Module | None = None,
    seconds: float = 1.0,
) -> Latency:
    """The models on the example, repeated or cut to `batch`; alternating for about `seconds`."""
    inputs = copied_to(resized(example, batch), device_of(floating))
    models = [model for model in (floating, integer, fused) if model is not None]
    with evaluating(floating), torch.inference_mode():
        times = timing.alternate([lambda model=model: feed(model, inputs) for model in models], seconds)
    return Latency(batch, *(timing.quantile(side, share) for side in times for share in (0.5, 0.99)))


def _fused(integer: nn.Module, example: Any, held: list[Any]) -> tuple[FusedModel | None, list[str]]:
    """The fused model, and notes on what it leaves in float; None and the reason if there is none."""
    device = device_of(integer).type
    if device not in ("cpu", "cuda"):
        return None, [f"Not fused: torch.ops.qk.network has kernels for the CPU and CUDA, not for {device}."]
    if not integer_layers(integer):
        return None, ["Not fused: only tables are quantized."]
    try:
        fast = fuse(integer, held if example is held[0] else [example, *held])
    except QkError as error:
        return None, [f"Not fused: {error}"]
    except Exception as error:  # a fault of ours must not lose what was quantized
        return None, [f"Not fused, please report it: qk.fuse raised {type(error).__name__}: {error}"]
    if fast.batch is not None:
        why = f"its graph is for batches of {fast.batch} alone, as the model takes their number for a constant"
        return None, [f"Not fused: {why}, with len(x) for example; x.shape[0] and x.flatten(1) take any."]
    by_reason: dict[str, list[str]] = {}
    for name, reason in fast.report:
        by_reason.setdefault(reason, []).append(name)
    return fast, [f"Not fused: {', '.join(dict.fromkeys(names))}: {reason}." for reason, names in by_reason.items()]


def _scale_channels(p: Prepared, held: list[Any], recipe: Recipe) -> list[str]:
    """What the recipe asks for before calibration; returns notes on it."""
    notes = []
    if recipe.relu6 == "relu":
        decibels = unclip(p, held[:MEASURED_BATCHES])
        notes.append(f"ReLU in place of ReLU6: {', '.join(p.unclipped) or 'nowhere'}; SQNR in float {decibels:.1f} dB.")
    if recipe.equalize:
        notes += equalize(p).notes("Equalized")
    if recipe.smooth is not None:
        notes += smooth(p, held, recipe.smooth, memory_mb=recipe.memory_mb).notes("Smoothed")
    return notes


def _joined(p: Prepared, recipe: Recipe) -> list[str]:
    """A note on where additions read quantized values."""
    if recipe.additions == "float":
        return []
    names = ", ".join(name or "the model" for name in working(p.model, p.joins)) or "nowhere"
    return [f"Quantized at the entry, for layers and additions: {names}."]


def _static(p: Prepared, recipe: Recipe) -> list[str]:
    """A note on the layers that a dynamic recipe leaves with a step of calibration."""
    images = [name for name in p.quant_layers() if recipe.dynamic and p.layers[name].kind != "linear"]
    return [f"Not dynamic, as convolutions have one step for all of an input: {', '.join(images)}."] if images else []


def _leave_slower_in_float(p: Prepared) -> None:
    """By timing alone, which the codes do not change: so it comes before learning, which then knows what stays."""
    times = all_layer_times(p, convert(p))
    slower = {
        name: f"slower in integers: {t.integer_ms:.3f} ms instead of {t.float_ms:.3f} ms"
        for name, t in times.items()
        if t.is_slower
    }
    if len(slower) == len(times):
        got = f"{len(slower)} of {len(times)} layers slower in integers on this machine"
        raise fail(STAGE, "recipe.only_faster", "false", got, "Set it so, or take a larger example.")
    leave_in_float(p, slower)


def _check_training(recipe: Recipe, given: dict[str, Any]) -> None:
    """Raises QkError for training without labelled data, and for labelled data that nothing would look at."""
    if recipe.method != "lsq":
        for name, value in given.items():
            if value is not None:
                raise fail(STAGE, name, "left out", f"one with method {recipe.method!r}", "Only 'lsq' trains.")
    elif given["train"] is None:
        expected = "pairs (inputs, labels) for method 'lsq', which trains on them"
        raise fail(STAGE, "train", expected, "none", "Pass train=..., or call qk.tune; 'brecq' needs no labels.")
    elif recipe.bias_correction or recipe.match_statistics:
        field = "bias_correction" if recipe.bias_correction else "match_statistics"
        raise fail(STAGE, f"recipe.{field}", "false", "true with method 'lsq', which trains biases and steps")


def _check_batches(model: nn.Module, example: Any, sizes: tuple[int, ...]) -> None:
    """Raises QkError for sizes at which the model cannot be timed."""
    offsets = _takes_offsets(model, example) if sizes else None
    if offsets is not None:
        # Cut, they point beyond the values that are left; repeated, they fall: torch's bags read and write there.
        got = f"{list(sizes)} for a model that gives {offsets} offsets"
        raise fail(STAGE, "latency_batches", "()", got, "Bags of another batch cannot be made up.")
    for n in sizes:
        if not isinstance(n, int) or n < 1:
            raise fail(STAGE, "latency_batches", "sizes of at least 1", n)
        try:
            with torch.no_grad():
                feed(model, copied_to(resized(example, n), device_of(model)))
        except Exception as error:
            got = f"{n}, on which it raised {type(error).__name__}: {error}"
            advice = "Pass the batch size of your data, or measure=False."
            raise fail(STAGE, "latency_batches", "sizes that the model accepts", got, advice) from error


def _takes_offsets(model: nn.Module, example: Any) -> str | None:
    """The name of an EmbeddingBag, quantized or not, that the model calls with offsets; one with bags is run for it."""
    found = []

    def see(bag: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("offsets")) is not None:
            found.append(names[bag])

    names = {module: name for name, module in model.named_modules() if hasattr(module, "include_last_offset")}
    if not names:
        return None
    handles = [bag.register_forward_pre_hook(see, with_kwargs=True) for bag in names]
    try:
        with torch.no_grad():
            feed(model, copied_to(example, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def share_met(evaluate: Callable[[nn.Module], float], model: nn.Module, stage: str = STAGE) -> float:
    """What evaluate finds. Raises QkError for what is no share."""
    found = evaluate(model)
    try:
        share = float(found)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise fail(stage, "evaluate", "a function that returns the share of labels met, from 0 to 1", repr(found)[:80])
    return share


def _layers(p: Prepared, measured: list[LayerMeasure]) -> list[LayerReport]:
    """Every layer that prepare found, then every other module with weights and why it stays in float."""
    by_name, quantized = {m.name: m for m in measured}, p.quant_layers()
    rows = []
    for name, layer in p.layers.items():
        spec, m = p.plan[name], by_name.get(name)
        values = (m.sqnr_db, m.float_bytes, m.integer_bytes, m.times.float_ms, m.times.integer_ms) if m else ()
        about = (spec.weights, spec.activations, p.kept.get(name, ""))
        more = 0 if spec.is_float else quantized[name].extra_rows
        rows.append(
            LayerReport(
                name,
                layer.kind,
                *about,
                *values,
                rows=layer.weight_shape[0],
                extra_rows=more,
                widths=replace(spec, points=1).describe(),
            )
        )
    others = [name for name in p.kept if name not in p.layers]
    return rows + [LayerReport(n, type(p.model.get_submodule(n)).__name__, reason=p.kept[n]) for n in others]


def _tables(integer: nn.Module) -> list[TableReport]:
    """Every quantized embedding table, those that the model held before too."""
    return [TableReport.of(name, table.num_embeddings, table) for name, table in table_modules(integer).items()]


def _notes(p: Prepared, measured: list[LayerMeasure]) -> list[str]:
    """What the tables do not say aloud."""
    notes = [] if p.search is None else [p.search.describe()]
    extra = overhead(p)
    if extra is not None:
        text = f"{extra.extra_rows} rows more than the {extra.rows} of the layers that may have several points"
        text += f": {100 * extra.extra_macs:.1f} % more multiply-adds there, {extra.bits:.2f} bits a weight on average."
        notes.append(text)
    slower = [m.name for m in measured if m.times.is_slower]
    if slower:
        advice = "the recipe's only_faster leaves such layers in float"
        notes.append(f"Slower in integers than in float, called alone: {', '.join(slower)}; {advice}.")
    nearest = [unit or "the model" for unit, steps in p.history.items() if steps[-1]["kept"] == "nearest"]
    if nearest:
        notes.append(f"Nearest rounding was kept where learning did not lower the loss: {', '.join(nearest)}.")
    return notes


def _widths(p: Prepared, method: str) -> str:
    """The commonest width of the plan and how its weights are rounded, and the commonest of the tables."""
    names = [spec.describe() for spec in p.plan.layers.values() if not spec.is_float]
    tables = [f"tables {spec.describe()}" for spec in p.tables.values()]
    commonest = [max(sorted(set(some)), key=some.count) for some in (names, tables) if some]
    return ", ".join(commonest[:1] + [method] * bool(names) + commonest[1:])


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds what it takes to seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
