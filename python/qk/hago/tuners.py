"""Searches for bits: of little loss, within a limit on costs."""

from __future__ import annotations

import math
import random as rnd
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np

from qk.errors import fail
from qk.hago.topology import STAGE, Bits, Dimension
from qk.search.exact import solve
from qk.search.problem import Problem

Tuner = Literal["default", "greedy", "random", "annealing", "exact"]
HOT, COLD = 0.5, 0.0005  # temperatures, of losses relative to that of the widest
SHARE, REACH = 0.1, 2  # of the dimensions that a proposal changes, by how many choices
TRIALS = 100  # of annealing
MOST = 256  # choices of a group that are looked at one by one
Found = dict[str, int]


@dataclass
class Trials:
    """Losses and costs of bits, each found once. groups: dimensions that the cost of an operator depends on together,
    an activation with the weights that it meets; together they hold every dimension once. limit: on the cost. history:
    (loss, cost) of every trial in order."""

    groups: list[tuple[Dimension, ...]]
    measure: Callable[[Bits], float]
    cost: Callable[[Bits], float]
    limit: float | None = None
    history: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._kept: dict[tuple[int, ...], float] = {}
        self.dimensions = [d for group in self.groups for d in group]
        self.widest: Found = {d.name: d.choices[0] for d in self.dimensions}

    def loss(self, bits: Bits) -> float:
        """Smaller is better."""
        key = tuple(bits[d.name] for d in self.dimensions)
        if key not in self._kept:
            found = self.measure(bits)
            self._kept[key] = math.inf if math.isnan(found) else found
            self.history.append((self._kept[key], self.cost(bits)))
        return self._kept[key]

    def fits(self, bits: Bits) -> bool:
        """Whether the limit is kept."""
        return self.limit is None or self.cost(bits) <= self.limit * (1 + 1e-9)

    def rank(self, bits: Bits) -> tuple[float, int]:
        """Of equal losses fewer bits are better."""
        return self.loss(bits), sum(bits.values())

    def options(self, group: tuple[Dimension, ...]) -> list[Found]:
        """Every choice for a group, the widest first; where there are more than MOST, its weights have one width."""
        if math.prod(len(d.choices) for d in group) <= MOST:
            every = product(*(d.choices for d in group))
        else:
            first, *weights = group
            widths = sorted({b for d in weights for b in d.choices}, reverse=True)
            even = [[max((c for c in d.choices if c <= b), default=d.choices[-1]) for d in weights] for b in widths]
            every = ((bits, *row) for bits in first.choices for row in even)
        return [{d.name: b for d, b in zip(group, bits, strict=True)} for bits in every]

    def cheapest(self) -> Found:
        """The cheapest choice for each group, the widest of equal ones.

        Raises QkError where even that is above the limit."""
        bits = dict(self.widest)
        for group in self.groups:
            bits |= min(self.options(group), key=lambda option: self.cost(bits | option))
        if not self.fits(bits):
            whole = self.cost(self.widest)
            expected = f"at least {self.cost(bits) / whole:.4f} of the cost at the widest, the least that it can be"
            raise fail(STAGE, "limit", expected, f"{self.limit / whole:.4f}")
        return bits


def default(trials: Trials, **_: object) -> Found:
    """The widest everywhere."""
    if not trials.fits(trials.widest):
        got = f"{trials.cost(trials.widest):.4g} with everything at its widest"
        raise fail(STAGE, "limit", f"for the tuner default at least {trials.limit:.4g}", got, "Take another tuner.")
    return dict(trials.widest)


def greedy(trials: Trials, lose: float = 0.0, **_: object) -> Found:
    """HAGO's: dimension by dimension in running order, ever fewer bits while the loss is at most that of the widest
    plus `lose`. Then, where a limit is not kept, the steps that lose least for what they save."""
    cheapest = dict(trials.widest) if trials.limit is None else trials.cheapest()
    bits = dict(trials.widest)
    most = trials.loss(bits) + lose
    for d in trials.dimensions:
        for choice in d.choices[1:]:
            fewer = bits | {d.name: choice}
            if trials.loss(fewer) > most:
                break
            bits = fewer
    while not trials.fits(bits):
        steps = [step for group in trials.groups if (step := _step(trials, bits, group)) is not None]
        if not steps:  # what was narrowed first is not the cheapest here
            return cheapest
        steps.sort(key=lambda step: step[0])
        for _, option in steps[: max(1, len(steps) // 4)]:
            bits = bits | option
            if trials.fits(bits):
                break
    return bits


def _step(trials: Trials, bits: Found, group: tuple[Dimension, ...]) -> tuple[float, Found] | None:
    """Loss for each unit saved by the nearest narrower choice for a group that saves anything; None: there is none."""
    now = trials.cost(bits)
    narrower = [o for o in trials.options(group) if all(b <= bits[name] for name, b in o.items())]
    for option in narrower:
        fewer = bits | option
        if (saved := now - trials.cost(fewer)) > 1e-12 * now:
            return (trials.loss(fewer) - trials.loss(bits)) / saved, option
    return None


def random(trials: Trials, count: int | None = None, seed: int = 0, **_: object) -> Found:
    """As many draws as there are dimensions, beside the widest and the cheapest; the best that keeps the limit."""
    draw = rnd.Random(seed)
    tried = [trials.cheapest(), trials.widest]
    for _i in range(len(trials.dimensions) if count is None else count):
        tried.append({d.name: draw.choice(d.choices) for d in trials.dimensions})
    return dict(min(filter(trials.fits, tried), key=trials.rank))


def annealing(trials: Trials, count: int | None = None, seed: int = 0, **_: object) -> Found:
    """Simulated annealing from the widest, or the cheapest where that breaks the limit; the best that was seen.

    Proposals change a tenth of the dimensions by up to two choices; one that breaks the limit is drawn again."""
    draw, count = rnd.Random(seed), TRIALS if count is None else count
    bits = trials.widest if trials.fits(trials.widest) else trials.cheapest()
    best, scale = bits, max(abs(trials.loss(trials.widest)), 1e-12)
    for i in range(count):
        heat = HOT * (COLD / HOT) ** (i / max(1, count - 1))
        for _try in range(100):
            proposal = _proposed(trials.dimensions, bits, draw)
            if trials.fits(proposal):
                break
        else:
            continue
        worse = (trials.loss(proposal) - trials.loss(bits)) / scale
        if worse <= 0 or draw.random() < math.exp(-worse / heat):
            bits = proposal
        best = min(best, bits, key=trials.rank)
    return dict(best)


def _proposed(dimensions: list[Dimension], bits: Bits, draw: rnd.Random) -> Found:
    found = dict(bits)
    for d in draw.sample(dimensions, max(1, round(SHARE * len(dimensions)))):
        at = d.choices.index(bits[d.name]) + draw.randint(-REACH, REACH)
        found[d.name] = d.choices[min(max(at, 0), len(d.choices) - 1)]
    return found


def exact(trials: Trials, **_: object) -> Found:
    """The least sum of losses that each dimension was seen to add alone, within the limit, by qk.search's solver. Costs
    of groups add up: that of an operator depends on one of them."""
    if trials.limit is None:
        raise fail(STAGE, "limit", "a share of the widest for the tuner exact", None)
    cheapest = trials.cheapest()
    base, whole = trials.loss(trials.widest), trials.cost(trials.widest)
    added = {(d.name, b): trials.loss(trials.widest | {d.name: b}) - base for d in trials.dimensions for b in d.choices}
    options = [trials.options(group) for group in trials.groups]
    losses = [np.array([sum(added[chosen] for chosen in o.items()) for o in row]) for row in options]
    saved = [np.array([whole - trials.cost(trials.widest | o) for o in row]) for row in options]
    costs = [row.max() - row for row in saved]  # not negative
    limit = trials.limit - whole + sum(float(row.max()) for row in saved)
    choice = solve(Problem(losses, {"cost": costs}, {"cost": limit}))
    if choice is None:  # by rounding, where only the cheapest fits
        return cheapest
    return {name: b for row, i in zip(options, choice, strict=True) for name, b in row[i].items()}


TUNERS: dict[str, Callable[..., Found]] = {
    "default": default,
    "greedy": greedy,
    "random": random,
    "annealing": annealing,
    "exact": exact,
}
