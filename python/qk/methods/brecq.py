"""BRECQ: learn the rounding of weights and the steps of activations, block by block, against the float model.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021); weights and
steps are learned together, and inputs mixed, as in Wei et al., QDrop (2022). Differences are in docs/methods/brecq.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qk import _native
from qk.calibrate import calibrate_activations
from qk.calibrate.batches import hold
from qk.errors import fail
from qk.inputs import device_of, part_generator
from qk.methods.adaround import Rounding, beta
from qk.methods.cache import Cache, Room, Sample, drop_mask
from qk.methods.engine import (
    STAGE,
    Loss,
    fill_cache,
    frozen,
    full_fisher,
    loss_on_all,
    outputs_of,
    power_of,
    unit_loss,
    units_of,
    weighted_square,
)
from qk.methods.lsq import ANEW, is_trainable
from qk.methods.replay import CudaGraphs, Replay
from qk.methods.resume import Finished, differences, run_of, steps_digest
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.prepared import Prepared, Unit, check_learnable, float_activations
from qk.progress import Progress
from qk.spec import Recipe, checked_recipe

RECORDS = 100  # points of a loss curve
FASTEST = 2e-3  # of the step it starts from: Adam moves one by no more in an iteration, however small it is
SMALLEST = 1e-3  # a learned step stays above this part of the one it started from, so it stays positive
# Adam's averages of a rounding that is decided, whose gradient is 0, shrink by 0.9 or less an iteration until they are
# subnormal numbers, where they stay, and each of those takes a CPU a hundred cycles. Every SWEEP iterations those below
# VANISHED, which move nothing, are set to 0; none falls from there to a subnormal number (1e-38) in between.
VANISHED, SWEEP = 1e-30, 64
STEPS_POWER = 2.4  # of the loss where steps are learned alone, as in BRECQ's released code
STEPS_SHARE = 4  # iterations of learning both, for one of learning steps alone


@dataclass(frozen=True)
class Phase:
    """What is learned in one pass over the units. suffix: of their names in the history. kept: what a unit keeps where
    learning does not help. drop: as in Recipe."""

    rounding: bool
    steps: bool
    iterations: int
    drop: float
    loss: Loss
    suffix: str = ""
    kept: str = "nearest"


def phases_of(recipe: Recipe) -> list[Phase]:
    """One that learns both, or BRECQ's order: rounding with float activations, then steps with float inputs."""
    loss = full_fisher if recipe.loss == "fisher_full" else weighted_square
    joint = Phase(True, True, recipe.iterations, recipe.drop, loss)
    if recipe.order == "joint":
        return [joint]
    rounding = replace(joint, steps=False, drop=1.0)
    if recipe.act_lr == 0:
        return [rounding]
    count = math.ceil(recipe.iterations / STEPS_SHARE)
    return [rounding, Phase(False, True, count, 0.0, power_of(STEPS_POWER), suffix=" (steps)", kept="calibrated")]


def narrow_of(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """What factors of products are rounded to while a unit is learned; None: they stay float32. "auto" asks for
    bfloat16 where this machine multiplies it in tiles (AMX)."""
    has_tiles = device.type == "cpu" and _native.active_isa() == "amx"
    return torch.bfloat16 if recipe.precision == "bfloat16" or (recipe.precision == "auto" and has_tiles) else None


def reconstruct(
    p: Prepared,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    progress: str = "auto",
    max_batches: int | None = None,
    resume: bool = False,
    folder: str | Path | None = None,
) -> None:
    """Learns the codes of p's weights and the steps of its activations, in place, unit by unit in running order.

    batches: as for calibrate; what is not a list is read once and held, as every unit needs the same ones again.
    recipe: granularity, loss, order, iterations, batch_size, weight_lr, act_lr, penalty, warmup, beta, drop,
    drop_inside, memory_mb, seed; with order "weights_first" also ranges. progress: "auto", "bar", "lines" or "off".
    p.history[unit] gets the loss curve. Its last entry is over all cached data with weights rounded: "loss" as learned,
    "before" with nearest rounding, "after" with what was "kept": "learned", or "nearest" where learning did not help.
    Where steps are learned afterwards, p.history["<unit> (steps)"] gets theirs, "calibrated" in place of "nearest".
    Interrupted, the current unit goes back to where it was and the finished ones stay; resume=True goes on from there,
    with the same bits as an uninterrupted run. Same seed, data and number of threads: same bits.
    folder: each finished unit is written there, and those that it holds already are taken from it instead of being
    learned: a run that was killed goes on in another process, to the same bits. One file for each unit.
    Dynamic layers learn their rounding alone, as their steps come with the rows.
    Raises QkError for p that is not calibrated, for bad batches, and for a folder that holds another run's units.
    """
    check_learnable(p, STAGE)
    recipe = checked_recipe(recipe, STAGE)
    if is_trainable(p):
        raise fail(STAGE, "p", "as prepared and calibrated", "one in training", ANEW)
    units = units_of(p, recipe.granularity)
    passes = [(phase, units if phase.rounding else _with_steps(p, units)) for phase in phases_of(recipe)]
    entries = [replace(unit, name=unit.name + phase.suffix) for phase, those in passes for unit in those]
    held = hold(batches, STAGE, max_batches, recipe.memory_mb)
    goes_on = resume and bool(p.history)
    run = run_of(p, entries, held, recipe, p.learned_in["calibrated steps"] if goes_on else steps_digest(p))
    other = differences(run, p.learned_in) if goes_on else []
    if other:
        got = f"that of another: {'; '.join(other)}"
        raise fail(STAGE, "resume", "of the run that was interrupted", got, "resume=False starts anew.")
    kept = None if folder is None else Finished(folder, p, entries, run)
    if not resume:
        p.history = {}
    p.learned_in = run
    if torch.is_inference_mode_enabled():
        raise fail(STAGE, "the call", "outside torch.inference_mode", "inside it", "Learning needs gradients.")
    total = sum(len(those) * phase.iterations for phase, those in passes)
    with torch.enable_grad(), frozen(p.model), Progress(progress, STAGE, len(entries), total) as shown:
        room = Room(recipe.memory_mb / 2)  # the units have the rest, which they read more often
        outputs = outputs_of(p, held, room) if recipe.loss != "mse" else None
        run = _Run(p, recipe, held, outputs, kept, shown, recipe.memory_mb / 2 + room.left / 2**20)
        first = 0
        for phase, those in passes:
            if those:
                run.learn(phase, those, entries[first : first + len(those)], first)
            first += len(those)


def _with_steps(p: Prepared, units: list[Unit]) -> list[Unit]:
    """Those with a step of activations to learn: of a layer that is not dynamic, and of no unit before."""
    layers, known, found = p.quant_layers(), set(), []
    for unit in units:
        own = {layers[name].input for name in unit.layers if not layers[name].spec.dynamic} - known
        known |= own
        found += [unit] if own else []
    return found


@dataclass
class _Run:
    """What the units of one reconstruction have in common. outputs: the float model's, for Fisher weights, or None.
    memory_mb: for what one unit caches."""

    p: Prepared
    recipe: Recipe
    batches: list
    outputs: list[Tensor] | None
    kept: Finished | None
    shown: Progress
    memory_mb: float

    def learn(self, phase: Phase, units: list[Unit], entries: list[Unit], first: int) -> None:
        """One pass over the units. entries: these by their names in the history; first: the number of their first."""
        p, recipe, kept = self.p, self.recipe, self.kept
        if not phase.rounding and not any(entry.name in p.history for entry in entries):
            calibrate_activations(p, self.batches, recipe.ranges)
        finished = set(p.tables)
        learned: set[ActQuantizer] = set()
        with nullcontext() if phase.steps else float_activations(p):
            for number, (unit, entry) in enumerate(zip(units, entries, strict=True), first):
                self.shown.unit(entry.name)
                if entry.name not in p.history and not (kept and kept.restore(number)):
                    p.history[entry.name] = self._unit(phase, unit, number, finished, learned)
                if kept and number not in kept.found:
                    kept.add(number)
                last = p.history[entry.name][-1]
                self.shown.end(phase.iterations, last["before"], last["after"], last["kept"])
                finished |= set(unit.layers)
                learned |= {p.quant_layers()[name].input for name in unit.layers}

    def _unit(
        self, phase: Phase, unit: Unit, number: int, finished: set[str], learned: set[ActQuantizer]
    ) -> list[dict]:
        """Learns one unit; returns its history. Its cache goes before the next one takes its room."""
        generator = part_generator(self.recipe.seed, number)
        room = Room(self.memory_mb, device_of(self.p.model))
        outputs = self.outputs if phase.rounding else None  # errors of steps have no Fisher weights
        cache = fill_cache(self.p, unit, finished, self.batches, room, outputs, mixed=phase.drop < 1)
        return _Unit(self.p, unit, learned, phase, self.recipe, generator).reconstruct(cache, self.shown)


def learn_unit(
    p: Prepared, unit: Unit, prefix: set[str], batches: list, recipe: Recipe, learned: set[ActQuantizer] | None = None
) -> list[dict]:
    """Learns one unit of p alone, in place; returns its history. prefix: the layers that are quantized before it.

    recipe: as of reconstruct, with loss "mse", for rounding and steps together. learned: quantizers whose steps stay,
    as another layer has learned with them.
    """
    shown = Progress("off", STAGE, 1, recipe.iterations)
    with torch.enable_grad(), frozen(p.model):
        return _Run(p, recipe, batches, None, None, shown, recipe.memory_mb)._unit(
            phases_of(recipe)[0], unit, 0, prefix, learned or set()
        )


class Learner:
    """The inner loop: v of every layer and the steps of `quantizers`, together, by Adam. Inside `with` the layers take
    their weights from v. generator: of dropping inside the unit. graphs: to replay iterations by."""

    def __init__(
        self,
        module: nn.Module,
        layers: list[QuantLayer],
        quantizers: list[ActQuantizer],
        recipe: Recipe,
        phase: Phase | None = None,
        generator: torch.Generator | None = None,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.module, self.layers, self.recipe, self.generator = module, layers, recipe, generator
        self.phase = phase or phases_of(recipe)[0]
        device = device_of(module)
        self.narrow = narrow_of(recipe, device)
        self.roundings = [Rounding(layer) for layer in layers if self.phase.rounding]
        self.steps = [q.step for q in quantizers] if self.phase.steps and recipe.act_lr > 0 else []
        self.floors = [step.detach() * SMALLEST for step in self.steps]
        rounding = {"params": [rounding.v for rounding in self.roundings], "lr": recipe.weight_lr}
        groups: list[dict] = [
            {"params": [s], "start": min(recipe.act_lr, FASTEST * float(s.detach()))} for s in self.steps
        ]
        self.penalty = torch.zeros(2, dtype=torch.float32, device=device)  # weight and exponent, now
        self.sweeps = device.type == "cpu"
        self.drops_inside = recipe.drop_inside and 0 < self.phase.drop < 1
        self.replay = Replay(self._iterate, graphs) if graphs and not self.drops_inside else None
        if self.replay:
            for group in groups:
                group["lr"] = torch.zeros((), dtype=torch.float32, device=device)  # where a graph reads it
        self.optimizer = torch.optim.Adam(
            [*groups, rounding] if self.roundings else groups, fused=True, capturable=device.type == "cuda"
        )

    def __enter__(self) -> Learner:
        for layer in self.layers:
            layer.narrow = self.narrow
        for rounding in self.roundings:
            rounding.layer.rounding = lambda rounding=rounding: rounding.value
        for step in self.steps:
            step.requires_grad_(True)
        if self.drops_inside:
            for layer in self.layers:
                layer.input.mix = self._mix
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            layer.rounding = layer.input.mix = layer.narrow = None
        for step in self.steps:
            step.requires_grad_(False)
            step.grad = None

    def step(self, sample: Sample, iteration: int) -> Tensor:
        """One iteration; returns the loss before it, without the penalty, which the next one may write over."""
        recipe, groups = self.recipe, self.optimizer.param_groups
        exponent = beta(iteration, recipe.iterations, recipe.warmup, recipe.beta)
        self.penalty[0] = 0.0 if iteration < recipe.warmup * recipe.iterations else recipe.penalty
        self.penalty[1] = exponent
        left = 0.5 * (1 + math.cos(math.pi * iteration / self.phase.iterations))  # a cosine to 0
        for group in groups[: len(self.steps)]:
            rate = left * group["start"]
            group["lr"] = group["lr"].fill_(rate) if self.replay else rate
        if self.sweeps and iteration % SWEEP == 0:
            self._sweep()
        return self.replay(sample) if self.replay else self._iterate(sample)

    def _iterate(self, sample: Sample) -> Tensor:
        """An iteration with the rates and the penalty of now."""
        for rounding in self.roundings:
            rounding.begin()
        output, loss, slope = unit_loss(self.module, sample, self.layers, self.phase.loss)
        self.optimizer.zero_grad()
        output.backward(slope)
        for rounding in self.roundings:
            rounding.end(self.penalty)
        self.optimizer.step()
        with torch.no_grad():
            for step, floor in zip(self.steps, self.floors, strict=True):
                step.clamp_(min=floor)
        return loss

    def _sweep(self) -> None:
        for rounding in self.roundings:
            for average in self.optimizer.state[rounding.v].values():
                if average.dim():  # not the count of steps
                    average.copy_(F.hardshrink(average, VANISHED))

    def _mix(self, x: Tensor, quantized: Tensor) -> Tensor:
        """Each value quantized with probability drop, else in float."""
        return torch.lerp(x, quantized, drop_mask(x, self.phase.drop, self.generator))


class _Unit:
    """One unit while it is learned. A step that several units share is learned with the first of them."""

    def __init__(
        self,
        p: Prepared,
        unit: Unit,
        learned: set[ActQuantizer],
        phase: Phase,
        recipe: Recipe,
        generator: torch.Generator,
    ) -> None:
        layers = p.quant_layers()
        self.p, self.names = p, {*unit.layers, *p.tables}
        self.phase, self.recipe, self.generator = phase, recipe, generator
        self.module = unit.module(p.model)
        self.layers: list[QuantLayer] = [layers[name] for name in unit.layers]
        static = dict.fromkeys(layer.input for layer in self.layers if not layer.spec.dynamic)
        self.quantizers = [q for q in static if q not in learned]

    def reconstruct(self, cache: Cache, shown: Progress) -> list[dict]:
        """The history. Whatever goes wrong, the unit is left as it was."""
        start = [layer.last_codes for layer in self.layers], [q.step.detach().clone() for q in self.quantizers]
        with self.p.quantized(self.names):
            before = self._loss(cache)
            try:
                history = self._learn(cache, shown)
                learned = self._loss(cache)
            except BaseException:
                self._commit(*start)
                raise
        better = learned <= before  # not if learning gave NaN
        if not better:
            self._commit(*start)
        after, kept = (learned, "learned") if better else (before, self.phase.kept)
        last = {"iteration": self.phase.iterations, "loss": learned, "before": before, "after": after, "kept": kept}
        return [*history, last]

    def _learn(self, cache: Cache, shown: Progress) -> list[dict]:
        history = []
        phase, iterations = self.phase, self.phase.iterations
        graphs = CudaGraphs() if device_of(self.module).type == "cuda" else None
        with Learner(self.module, self.layers, self.quantizers, self.recipe, phase, self.generator, graphs) as learner:
            for i in range(iterations):
                fit = learner.step(cache.sample(self.recipe.batch_size, phase.drop, self.generator), i)
                if i % max(1, iterations // RECORDS) == 0:
                    history.append({"iteration": i, "loss": fit.item()})
                    shown.at(i, history[-1]["loss"])
            codes = [r.codes() for r in learner.roundings] or [layer.last_codes for layer in self.layers]
        self._commit(codes, [q.step for q in self.quantizers])
        return history

    @torch.no_grad()
    def _commit(self, codes: list[Tensor], steps: list[Tensor]) -> None:
        for layer, one in zip(self.layers, codes, strict=True):
            layer.last_codes = one
        for quantizer, step in zip(self.quantizers, steps, strict=True):
            quantizer.step.copy_(step)

    def _loss(self, cache: Cache) -> float:
        return loss_on_all(self.module, cache, self.recipe.batch_size, self.layers, self.phase.loss)
