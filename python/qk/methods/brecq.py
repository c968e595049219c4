"""BRECQ: learn the rounding of weights and the steps of activations, block by block, against the float model.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021); weights and
steps are learned together, and inputs mixed, as in Wei et al., QDrop (2022). Differences are in docs/methods/brecq.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from qk.calibrate.batches import hold
from qk.errors import fail
from qk.methods.adaround import Rounding, beta
from qk.methods.cache import Cache, Room, Sample
from qk.methods.engine import STAGE, fill_cache, frozen, loss_on_all, outputs_of, unit_loss, units_of
from qk.methods.lsq import ANEW, is_trainable
from qk.methods.progress import Progress
from qk.methods.resume import Finished, steps_digest
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.prepared import Prepared, Unit, check_prepared
from qk.spec import Recipe, checked_recipe

RECORDS = 100  # points of a loss curve
SMALLEST = 1e-3  # a learned step stays above this part of the one it started from, so it stays positive


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
    recipe: granularity, loss, iterations, batch_size, weight_lr, act_lr, penalty, warmup, beta, drop, memory_mb, seed.
    progress: "auto", "bar", "lines" or "off".
    p.history[unit] gets the loss curve. Its last entry is over all cached data with weights rounded: "loss" as learned,
    "before" with nearest rounding, "after" with what was "kept": "learned", or "nearest" where learning did not help.
    Interrupted, the current unit goes back to nearest rounding and the finished ones stay; resume=True goes on from
    there, with the same bits as an uninterrupted run. Same seed, data and number of threads: same bits.
    folder: each finished unit is written there, and those that it holds already are taken from it instead of being
    learned: a run that was killed goes on in another process, to the same bits. One file for each unit.
    Raises QkError for p that is not calibrated, for bad batches, and for a folder that holds another run's units.
    """
    check_prepared(p, STAGE)
    recipe = checked_recipe(recipe, STAGE)
    if not p.calibrated:
        raise fail(STAGE, "p", "calibrated", "one that is not", "Call qk.calibrate(p, batches) first.")
    if is_trainable(p):
        raise fail(STAGE, "p", "as prepared and calibrated", "one in training", ANEW)
    units = units_of(p, recipe.granularity)
    held = hold(batches, STAGE, max_batches, recipe.memory_mb)
    before = p.steps_before if resume and p.history else steps_digest(p)
    kept = None if folder is None else Finished(folder, p, units, held, recipe, before)
    if not resume:
        p.history = {}
    p.steps_before = before
    finished: set[str] = set()
    learned: set[ActQuantizer] = set()
    if torch.is_inference_mode_enabled():
        raise fail(STAGE, "the call", "outside torch.inference_mode", "inside it", "Learning needs gradients.")
    with torch.enable_grad(), frozen(p.model), Progress(progress, STAGE, len(units), recipe.iterations) as shown:
        outputs = outputs_of(p, held, Room(recipe.memory_mb)) if recipe.loss == "fisher" else None
        for number, unit in enumerate(units):
            shown.unit(unit.name)
            if unit.name not in p.history and not (kept and kept.restore(number)):
                generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
                cache = fill_cache(p, unit, finished, held, Room(recipe.memory_mb), outputs, mixed=recipe.drop < 1)
                p.history[unit.name] = _Unit(p, unit, learned).reconstruct(cache, recipe, generator, shown)
            if kept and number not in kept.found:
                kept.add(number)
            last = p.history[unit.name][-1]
            shown.end(last["before"], last["after"], last["kept"])
            finished |= set(unit.layers)
            learned |= {p.quant_layers()[name].input for name in unit.layers}


class Learner:
    """The inner loop: v of every layer and the steps of `quantizers`, together, by Adam. Inside `with` the layers take
    their weights from v."""

    def __init__(
        self, module: nn.Module, layers: list[QuantLayer], quantizers: list[ActQuantizer], recipe: Recipe
    ) -> None:
        self.module, self.layers, self.recipe = module, layers, recipe
        self.roundings = [Rounding(layer) for layer in layers]
        self.steps = [q.step for q in quantizers] if recipe.act_lr > 0 else []
        self.floors = [step.detach() * SMALLEST for step in self.steps]
        groups: list[dict] = [{"params": [rounding.v for rounding in self.roundings], "lr": recipe.weight_lr}]
        groups += [{"params": self.steps, "lr": recipe.act_lr}] if self.steps else []
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def __enter__(self) -> Learner:
        for rounding in self.roundings:
            rounding.layer.rounding = rounding.soft
        for step in self.steps:
            step.requires_grad_(True)
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self.layers:
            layer.rounding = None
        for step in self.steps:
            step.requires_grad_(False)
            step.grad = None

    def step(self, sample: Sample, iteration: int) -> Tensor:
        """One iteration; returns the loss before it, without the penalty."""
        output, loss, slope = unit_loss(self.module, sample, self.layers)
        self.optimizer.zero_grad()
        output.backward(slope)
        self._penalize(iteration)
        self.optimizer.step()
        with torch.no_grad():
            for step, floor in zip(self.steps, self.floors, strict=True):
                step.clamp_(min=floor)
        if self.steps:  # cosine to 0
            done = (iteration + 1) / self.recipe.iterations
            self.optimizer.param_groups[1]["lr"] = 0.5 * self.recipe.act_lr * (1 + math.cos(math.pi * done))
        return loss

    @torch.no_grad()
    def _penalize(self, iteration: int) -> None:
        """Adds the penalty's gradient. Its value is not needed, so only the backward kernel runs."""
        recipe = self.recipe
        if iteration < recipe.warmup * recipe.iterations or recipe.penalty == 0:
            return
        exponent = beta(iteration, recipe.iterations, recipe.warmup, recipe.beta)
        for v in (rounding.v for rounding in self.roundings):
            v.grad.add_(torch.ops.qk.rounding_penalty_backward(v.new_tensor(recipe.penalty), v, exponent))


class _Unit:
    """One unit while it is learned. A step that several units share is learned with the first of them."""

    def __init__(self, p: Prepared, unit: Unit, learned: set[ActQuantizer]) -> None:
        layers = p.quant_layers()
        self.p, self.names = p, set(unit.layers)
        self.module: nn.Module = p.model.get_submodule(unit.name)
        self.layers: list[QuantLayer] = [layers[name] for name in unit.layers]
        self.quantizers = [q for q in dict.fromkeys(layer.input for layer in self.layers) if q not in learned]

    def reconstruct(self, cache: Cache, recipe: Recipe, generator: torch.Generator, shown: Progress) -> list[dict]:
        """The history. Whatever goes wrong, the unit is left with nearest rounding."""
        nearest = [layer.codes for layer in self.layers], [q.step.detach().clone() for q in self.quantizers]
        with self.p.quantized(self.names):
            before = self._loss(cache, recipe)
            try:
                history = self._learn(cache, recipe, generator, shown)
                learned = self._loss(cache, recipe)
            except BaseException:
                self._commit(*nearest)
                raise
        better = learned <= before  # not if learning gave NaN
        if not better:
            self._commit(*nearest)
        after, kept = (learned, "learned") if better else (before, "nearest")
        last = {"iteration": recipe.iterations, "loss": learned, "before": before, "after": after, "kept": kept}
        return [*history, last]

    def _learn(self, cache: Cache, recipe: Recipe, generator: torch.Generator, shown: Progress) -> list[dict]:
        history = []
        with Learner(self.module, self.layers, self.quantizers, recipe) as learner:
            for i in range(recipe.iterations):
                fit = learner.step(cache.sample(recipe.batch_size, recipe.drop, generator), i)
                if i % max(1, recipe.iterations // RECORDS) == 0:
                    history.append({"iteration": i, "loss": fit.item()})
                    shown.at(i, history[-1]["loss"])
            codes = [rounding.codes() for rounding in learner.roundings]
        self._commit(codes, [q.step for q in self.quantizers])
        return history

    @torch.no_grad()
    def _commit(self, codes: list[Tensor], steps: list[Tensor]) -> None:
        for layer, one in zip(self.layers, codes, strict=True):
            layer.codes = one
        for quantizer, step in zip(self.quantizers, steps, strict=True):
            quantizer.step.copy_(step)

    def _loss(self, cache: Cache, recipe: Recipe) -> float:
        return loss_on_all(self.module, cache, recipe.batch_size, self.layers)
