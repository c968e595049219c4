"""The problem of mixed precision: one option for each item, of least loss, within limits on sums of costs.

A multiple-choice knapsack with several limits and, where items act on each other's loss, terms for pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qk.errors import fail

STAGE = "qk.search"
EPS = float(np.finfo(np.float64).eps)

Choice = tuple[int, ...]  # the number of the option taken, for each item


@dataclass(frozen=True, eq=False)
class Problem:
    """Items, their options, and what a choice of one option for each may cost.

    losses: for each item [options], any sign; items may differ in how many options they have. costs: name -> for each
    item [options], not negative. limits: name of a cost -> the largest sum of it. pairs: (i, j) with i < j ->
    [options of i, options of j], any sign, added to the loss where both are chosen. Arrays are copied, as float64.
    Raises QkError for what does not fit together or is not finite.
    """

    losses: Sequence[np.ndarray]
    costs: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    pairs: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        losses = tuple(_losses(i, x) for i, x in enumerate(self.losses))
        if not losses:
            raise fail(STAGE, "losses", "those of at least one item", "none")
        costs = {name: _costs(name, given, losses) for name, given in self.costs.items()}
        for name, limit in self.limits.items():
            if name not in costs:
                raise fail(STAGE, "limits", f"on costs that there are ({', '.join(costs) or 'none'})", repr(name))
            if not math.isfinite(limit):
                raise fail(STAGE, f"the limit on {name}", "finite", limit, "Leave it out where nothing limits.")
        pairs = {key: _pair(key, given, losses) for key, given in self.pairs.items()}
        limits = {name: float(limit) for name, limit in self.limits.items()}
        for name, value in (("losses", losses), ("costs", costs), ("limits", limits), ("pairs", pairs)):
            object.__setattr__(self, name, value)

    def loss(self, choice: Choice) -> float:
        """Sum over items and pairs, correctly rounded: the same for every order of the terms."""
        return math.fsum(self._terms(choice))

    def rounding(self, choice: Choice) -> float:
        """Losses that differ by less are equal: each term, and the sum, is off by up to EPS / 2 of itself, in both."""
        return 2 * EPS * math.fsum(map(abs, self._terms(choice)))

    def cost(self, name: str, choice: Choice) -> float:
        """Sum over items, correctly rounded."""
        return math.fsum(values[option] for values, option in zip(self.costs[name], choice, strict=True))

    @cached_property
    def allowed(self) -> dict[str, float]:
        """Name -> the limit with room for rounding: one that was added up from n costs, each after the other, is off by
        up to (n - 1) EPS / 2 of itself; costs, limit, the sum in `cost` and the product here by EPS / 2 each."""
        return {name: limit * (1 + (len(self.losses) + 3) / 2 * EPS) for name, limit in self.limits.items()}

    def is_feasible(self, choice: Choice) -> bool:
        """Whether every limit is kept."""
        return all(self.cost(name, choice) <= most for name, most in self.allowed.items())

    def relative_cost(self, choice: Choice) -> float:
        """Sum of the limited costs, each in units of its limit."""
        return math.fsum(self.cost(name, choice) / limit for name, limit in self.limits.items() if limit > 0)

    def _terms(self, choice: Choice) -> list[float]:
        alone = [values[option] for values, option in zip(self.losses, choice, strict=True)]
        return alone + [matrix[choice[i], choice[j]] for (i, j), matrix in self.pairs.items()]


def _array(given: object, what: str) -> np.ndarray:
    try:
        found = np.array(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise fail(STAGE, what, "numbers", repr(given)) from None
    if not np.isfinite(found).all():
        raise fail(STAGE, what, "finite", "NaN or infinity")
    found.flags.writeable = False
    return found


def _losses(item: int, given: object) -> np.ndarray:
    found = _array(given, f"losses of item {item}")
    if found.ndim != 1 or not found.size:
        raise fail(STAGE, f"losses of item {item}", "[options] with at least one", list(found.shape))
    return found


def _costs(name: str, given: Sequence, losses: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    if len(given) != len(losses):
        raise fail(STAGE, f"costs {name!r}", f"of {len(losses)} items, as the losses", len(given))
    found = tuple(_array(x, f"costs {name!r} of item {i}") for i, x in enumerate(given))
    for item, (values, like) in enumerate(zip(found, losses, strict=True)):
        if values.shape != like.shape:
            raise fail(
                STAGE, f"costs {name!r} of item {item}", f"{list(like.shape)}, as its losses", list(values.shape)
            )
        if values.min() < 0:
            raise fail(STAGE, f"costs {name!r} of item {item}", "0 or more", values.min())
    return found


def _pair(key: tuple[int, int], given: object, losses: tuple[np.ndarray, ...]) -> np.ndarray:
    i, j = key
    if not 0 <= i < j < len(losses):
        raise fail(STAGE, "pairs", f"of items i < j below {len(losses)}", key)
    found, shape = _array(given, f"the pair {key}"), (losses[i].size, losses[j].size)
    if found.shape != shape:
        raise fail(STAGE, f"the pair {key}", f"[options of {i}, options of {j}], {list(shape)}", list(found.shape))
    return found
