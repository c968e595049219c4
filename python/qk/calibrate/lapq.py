"""LAPQ: all steps of a network together, by the loss of its task.

Source: Nahshan et al., Loss Aware Post-training Quantization (2019). Start from steps that minimize the Lp error of
each tensor alone, with the p of lowest loss; then Powell's method on all of them. Differences: docs/methods/lapq.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qk.calibrate import ranges as find
from qk.calibrate.batches import call
from qk.calibrate.objective import first_tensor, label_loss, task_loss
from qk.calibrate.observe import Observer
from qk.calibrate.prefix import PrefixCache
from qk.errors import fail
from qk.inputs import describe, evaluating, map_tensors, tensors_in
from qk.prepare.insert import DEPLOYED, ActQuantizer, QuantLayer
from qk.prepare.prepared import Prepared
from qk.progress import Progress

STAGE = "qk.calibrate"
POWERS = (2.0, 2.5, 3.0, 3.5, 4.0)
SWEEPS = 2  # iterations of Powell's method
REACH = 2.0  # a step moves at most by this factor,
LEAST, MOST = 0.05, 1.2  # and stays within these parts of the step that clips nothing
GRAIN = 0.01  # of the logarithm of a step: finer moves are not told apart
STRIDE = 0.05  # of the same: the first move that a line search tries
HOPELESS = 1e30  # stands for a loss that is not finite

Loss = Callable[[Tensor, Tensor], Tensor]
Owner = ActQuantizer | QuantLayer
Range = tuple[Tensor, Tensor]


@dataclass
class Found:
    """What the search saw. Losses are means over samples.

    by_power: p -> loss of the network with Lp steps; inf: with steps that clip nothing. power: the p taken. start, end:
    loss on the half that is searched, before and after Powell's method. judged_start, judged_end: on the other half.
    sweeps: iterations accepted there. evaluations: passes over the first half. hits, misses: calls of watched modules
    answered from the cache, and run.
    """

    by_power: dict[float, float] = field(default_factory=dict)
    power: float = math.nan
    start: float = math.nan
    end: float = math.nan
    judged_start: float = math.nan
    judged_end: float = math.nan
    sweeps: int = 0
    evaluations: int = 0
    hits: int = 0
    misses: int = 0

    def describe(self) -> str:
        """In a sentence."""
        starts = f"of starts with a loss of {min(self.by_power.values()):.4g} to {max(self.by_power.values()):.4g}"
        searched = f"{self.start:.4g} -> {self.end:.4g} on the batches searched on"
        judged = f"{self.judged_start:.4g} -> {self.judged_end:.4g} on the others"
        how = f"{self.sweeps} sweeps accepted, {self.evaluations} evaluations"
        return f"LAPQ: p = {self.power:.3g} {starts}; then {searched}, {judged} ({how})."


def lowest_of_parabola(powers: Sequence[float], losses: Sequence[float]) -> float | None:
    """The p at the vertex of the least-squares parabola; None where it opens downwards, is no parabola, or its vertex
    lies outside the powers that were tried."""
    at, of = np.asarray(powers, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(set(powers)) < 3 or not np.isfinite(of).all():
        return None
    curvature, slope, _ = np.polyfit(at, of, 2)
    if curvature <= 1e-12 * max(1.0, float(np.abs(of).max())):
        return None
    vertex = float(-slope / (2 * curvature))
    return vertex if at.min() <= vertex <= at.max() else None


def powell(
    loss: Callable[[np.ndarray], float],
    lower: np.ndarray,
    upper: np.ndarray,
    judge: Callable[[np.ndarray], float],
    sweeps: int = SWEEPS,
) -> tuple[np.ndarray, int]:
    """The point between the bounds, from 0 on, that Powell's method finds, and how many iterations were accepted.

    After each iteration the best point seen so far is shown to `judge`; where it finds that worse than the one
    accepted before, or no better, the search ends. Variables are logarithms, told apart by GRAIN: a line search that
    wants to know more gets what is known. A point beyond a bound counts as the one at the bound.
    """
    from scipy.optimize import minimize  # here: importing qk need not wait for it

    known: dict[bytes, float] = {}
    best = accepted = _on_grid(np.zeros(len(lower)), lower, upper)
    lowest = math.inf
    judged, count = judge(accepted), 0

    def at(y: np.ndarray) -> float:
        nonlocal best, lowest
        x = _on_grid(np.atleast_1d(y) * STRIDE, lower, upper)
        key = x.tobytes()
        if key not in known:
            found = loss(x)
            known[key] = found if math.isfinite(found) else HOPELESS
            if known[key] < lowest:
                best, lowest = x, known[key]
        return known[key]

    def after(_: np.ndarray) -> None:
        nonlocal accepted, judged, count
        if best is accepted:
            raise _Enough
        found = judge(best)
        if not found < judged:
            raise _Enough
        accepted, judged, count = best, found, count + 1

    options = {"maxiter": sweeps, "xtol": GRAIN / STRIDE / 100, "ftol": 1e-4}
    with suppress(_Enough):
        minimize(at, np.zeros(len(lower)), method="Powell", callback=after, options=options)
    return accepted, count


class _Enough(Exception):
    """Leaves scipy from a callback."""


def _on_grid(x: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / GRAIN) * GRAIN, lower, upper)


def search(
    p: Prepared,
    observers: dict[ActQuantizer, Observer],
    batches: list[Any],
    *,
    labels: list[Tensor] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    memory_mb: float = 1024,
    sweeps: int = SWEEPS,
    progress: str = "off",
) -> Found:
    """Sets every step of p. observers: what the float model's activations are. batches: at least two, or one that can
    be halved: one half is searched on, the other accepts. labels: of each batch. loss, progress: see qk.calibrate.

    Raises QkError for what calibrate promises. Whatever goes wrong, p is as before.
    """
    seen = Found()
    data = _Data.of(p, batches, labels, loss, memory_mb)
    searched, judging = data.halves(seed)
    layers = p.quant_layers()
    shown = Progress(progress, STAGE, 1 + sweeps, None)
    with _unchanged_on_error(layers), evaluating(p.model), p.quantized(), shown:
        steps = Steps(layers)
        uses = {layer: [steps.place[o] for o in owners_of(layer)] for layer in layers.values()}
        with PrefixCache(p, uses, data.left / 2**20, STAGE) as cache:

            def measured(x: np.ndarray) -> float:
                steps.move(x)
                cache.move(x)
                seen.evaluations += 1
                found = data.loss(searched, cache.run)
                shown.at(seen.evaluations, found)
                return found

            def judged(x: np.ndarray) -> float:
                steps.move(x)
                was, cache.enabled = cache.enabled, False
                found = data.loss(judging, cache.run)
                cache.enabled = was
                return found

            def judge(x: np.ndarray) -> float:
                found = judged(x)
                words = f"loss {found:.4g} on the batches that judge after {seen.evaluations} evaluations"
                shown.finish(0, words)
                shown.unit(f"LAPQ sweep {shown.done}")
                return found

            cache.enabled = False  # other zeros, equal multipliers
            shown.unit("LAPQ starts")
            _start(steps, observers, measured, seen)
            cache.enabled = cache.left > 0
            if not _repeats(measured, steps.still, seen.start):
                cache.close()
            seen.judged_start = judged(steps.still)
            x, seen.sweeps = powell(measured, *steps.bounds(observers), judge, sweeps)
            seen.judged_end = judged(x)
            seen.end = measured(x)
            seen.hits, seen.misses = cache.hits, cache.misses
    return seen


def _start(
    steps: Steps, observers: dict[ActQuantizer, Observer], measured: Callable[[np.ndarray], float], seen: Found
) -> None:
    """Leaves the steps of lowest loss: those of the powers tried, of the vertex of the parabola through their losses,
    and those that clip nothing (power inf)."""
    for power in (*POWERS, math.inf):
        steps.begin(lp_ranges(steps.owners, observers, power))
        seen.by_power[power] = measured(steps.still)
    if not any(map(math.isfinite, seen.by_power.values())):
        advice = "Use more bits, or look at what the loss does with the model's output."
        raise fail(STAGE, "the loss of the quantized model", "finite", "NaN or infinity for every start", advice)
    vertex = lowest_of_parabola(POWERS, [seen.by_power[power] for power in POWERS])
    if vertex is not None and vertex not in seen.by_power:
        steps.begin(lp_ranges(steps.owners, observers, vertex))
        seen.by_power[vertex] = measured(steps.still)
    finite = {power: loss for power, loss in seen.by_power.items() if math.isfinite(loss)}
    seen.power = min(finite, key=finite.__getitem__)
    seen.start = seen.by_power[seen.power]
    steps.begin(lp_ranges(steps.owners, observers, seen.power))


def _repeats(measured: Callable[[np.ndarray], float], still: np.ndarray, expected: float) -> bool:
    """Whether the model gives the same bits with outputs kept as without: not one that hides what a layer computed
    beside its output. The first pass sees that nothing moves, the second keeps, the third is answered."""
    return all(measured(still) == expected for _ in range(3))


def lp_ranges(owners: Sequence[Owner], observers: dict[ActQuantizer, Observer], power: float) -> dict[Owner, Range]:
    """Step and zero of least |x - fake quantized|^power, each tensor (each row of a weight) by itself."""
    if power == math.inf:
        return {owner: widest(owner, observers) for owner in owners}
    found: dict[Owner, Range] = {}
    for owner in owners:
        if isinstance(owner, QuantLayer):
            found[owner] = find.of_weight(owner.weight_rows(), owner.spec, power)
        else:
            seen = observers[owner]
            low, high = torch.tensor([seen.low]), torch.tensor([seen.high])
            ends = seen.low < 0 < seen.high
            found[owner] = find.mse(seen.sample(), owner.bits, low=low, high=high, power=power, ends=ends)
    return found


def widest(owner: Owner, observers: dict[ActQuantizer, Observer]) -> Range:
    """Steps that clip nothing, and their zeros."""
    if isinstance(owner, QuantLayer):
        return find.of_weight(owner.weight_rows(), owner.spec, math.inf)
    seen = observers[owner]
    return find.step_and_zero(torch.tensor([seen.low]), torch.tensor([seen.high]), owner.bits)


def owners_of(layer: QuantLayer) -> list[Owner]:
    """What of the layer has steps: its input, unless each row brings its own, and its weight."""
    return [layer] if layer.spec.dynamic else [layer.input, layer]


class Steps:
    """All steps of a network as one vector: element i is the logarithm of the factor on the first choice of its owner.

    An owner is an ActQuantizer or a QuantLayer, whose rows keep their ratios: a step for each row would be thousands of
    variables. Zeros stay, so that a factor scales a range about 0. Late owners come first: in a sweep of Powell's
    method in that order nothing before the step that moves has moved, and the cache holds for all of the sweep.
    """

    def __init__(self, layers: dict[str, QuantLayer]) -> None:
        forwards = dict.fromkeys(owner for layer in layers.values() for owner in owners_of(layer))
        self.owners: list[Owner] = list(forwards)[::-1]
        self.place = {owner: i for i, owner in enumerate(self.owners)}
        self.still = np.zeros(len(self.owners))
        self._first: dict[Owner, Range] = {}
        self._now = np.full(len(self.owners), np.nan)

    def begin(self, ranges: dict[Owner, Range]) -> None:
        """From now on factors are on these."""
        self._first = ranges
        self._now = np.full(len(self.owners), np.nan)
        self.move(self.still)

    def move(self, x: np.ndarray) -> None:
        """Gives p the steps of x; codes of a weight are made anew only where its factor changed."""
        for i in np.flatnonzero(x != self._now):
            owner = self.owners[i]
            step, zero = self._first[owner]
            scaled = step * math.exp(x[i])
            if isinstance(owner, QuantLayer):
                owner.set_weight_range(scaled, zero)
            else:
                owner.set_range(scaled, zero)
        self._now = x.copy()

    def bounds(self, observers: dict[ActQuantizer, Observer]) -> tuple[np.ndarray, np.ndarray]:
        """Of each element: REACH, and LEAST and MOST of what clips nothing in any row."""
        lower, upper = np.empty(len(self.owners)), np.empty(len(self.owners))
        for i, owner in enumerate(self.owners):
            room = widest(owner, observers)[0].double() / self._first[owner][0].double().cpu()
            lower[i] = math.log(max(1 / REACH, LEAST * float(room.min())))
            upper[i] = math.log(min(REACH, MOST * float(room.max())))
        return np.minimum(lower, 0), np.maximum(upper, 0)


@contextmanager
def _unchanged_on_error(layers: dict[str, QuantLayer]) -> Iterator[None]:
    weights = [(layer, {name: getattr(layer, name) for name in DEPLOYED}) for layer in layers.values()]
    quantizers = {x.input for x in layers.values() if not x.spec.dynamic}
    inputs = [(q, q.step.detach().clone(), q.zero.clone(), q.calibrated) for q in quantizers]
    try:
        yield
    except BaseException:
        for layer, tensors in weights:
            for name, tensor in tensors.items():
                setattr(layer, name, tensor)
        for quantizer, step, zero, calibrated in inputs:
            quantizer.set_range(step, zero)
            quantizer.calibrated = calibrated
        raise


@dataclass
class _Data:
    """Batches with what the model should make of each. left: bytes of the memory allowed that are not taken."""

    batches: list[Any]
    expected: list[Tensor]
    measure: Loss
    left: int

    @staticmethod
    def of(p: Prepared, batches: list[Any], labels: list[Tensor] | None, loss: Loss | None, memory_mb: float) -> _Data:
        """Raises QkError for labels that do not fit, and a single batch that has no halves."""
        if labels is not None and len(labels) != len(batches):
            raise fail(STAGE, "labels", f"one tensor for each of {len(batches)} batches", f"{len(labels)}")
        if len(batches) == 1:
            batches, labels = _halved(batches[0], labels)
        left = int(memory_mb * 2**20)
        expected = list(labels or ())
        if labels is None:
            with p.quantized(set()), evaluating(p.model):
                for i, batch in enumerate(batches):
                    expected.append(first_tensor(call(p, batch, i, STAGE), STAGE).detach().clone())
                    left -= expected[-1].nbytes
                    if left < 0:
                        got = f"more after {i} batches"
                        advice = "Raise memory_mb, or pass fewer batches."
                        raise fail(STAGE, "the float model's outputs", f"at most {memory_mb} MB", got, advice)
                    if not torch.isfinite(expected[-1]).all():
                        where = f"the float model's output for batch {i}"
                        raise fail(STAGE, where, "finite", "NaN or infinity", "Look for it in the batch.")
        return _Data(batches, expected, loss or (task_loss if labels is None else label_loss), left)

    def halves(self, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of the batches to search on, and of those that accept; the odd one is searched on."""
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(seed)).tolist()
        half = (len(order) + 1) // 2
        return sorted(order[:half]), sorted(order[half:])

    def loss(self, numbers: list[int], run: Callable[[int, Any], Any]) -> float:
        """The mean over all samples of these batches."""
        total, rows = 0.0, 0
        for i in numbers:
            found = first_tensor(run(i, self.batches[i]), STAGE)
            total += self._one(i, found)
            rows += found.shape[0] if found.dim() else 1
        return total / max(1, rows)

    def _one(self, i: int, found: Tensor) -> float:
        try:
            expected = self.expected[i].to(found.device)
            if self.measure is task_loss:
                return float(task_loss(found, expected, self.batches[i]))
            return float(self.measure(found, expected))
        except Exception as error:
            what = f"{describe(found)} and {describe(self.expected[i])}"
            got = f"{type(error).__name__} on {what}: {error}"
            advice = "It gets the model's output and the labels of a batch, or the float model's output."
            expected = "a function that returns one number, the sum over samples"
            raise fail(STAGE, "loss", expected, got, advice) from error


def _halved(batch: Any, labels: list[Tensor] | None) -> tuple[list[Any], list[Tensor] | None]:
    """Two batches of one, along the first axis that all of its tensors share."""
    tensors = [*tensors_in(batch), *(labels or ())]
    sizes = {x.shape[0] if x.dim() else 0 for x in tensors}
    if len(sizes) != 1 or (rows := sizes.pop()) < 2:
        got = f"one that has no halves, {describe(batch)}"
        raise fail(STAGE, "batches", "at least two for lapq, as half of them judge what the others found", got)
    half = (rows + 1) // 2
    parts = [map_tensors(lambda x: x[:half], batch), map_tensors(lambda x: x[half:], batch)]
    return parts, None if labels is None else [labels[0][:half], labels[0][half:]]
