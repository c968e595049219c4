"""Small changes of choices: back within the limits, and down to where no change of one or two items helps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qk.search.flat import Flat
from qk.search.problem import EPS, Choice

GAIN = 1e-12  # of what a cost can vary by: an excess that shrinks by less shrinks by rounding alone


def repair(flat: Flat, taken: np.ndarray) -> np.ndarray:
    """Choices [choices, items] made to fit where single changes can: each time the change that adds least to the loss
    for what it takes off the excess, the sum over limits of what is above, in units of what that cost can vary by."""
    taken = taken.copy()
    unit = flat.spread(flat.cost)[:, None, None]
    unit[unit == 0] = 1
    while len(rest := np.flatnonzero(~flat.fits(taken))):
        now = taken[rest]
        current = now[:, flat.item]  # [choices, N]: what each option would take the place of
        above = flat.costs(now)[:, :, None] - flat.allowed[:, None, None]  # [limits, choices, 1]
        after = above + flat.cost[:, None] - flat.cost[:, current]
        less = (np.maximum(above, 0) / unit).sum(0) - (np.maximum(after, 0) / unit).sum(0)
        given = flat.given(now)
        more = given - np.take_along_axis(given, current, 1)
        price = np.divide(more, less, out=np.full_like(more, np.inf), where=less > GAIN)
        best = price.argmin(1)
        can = np.isfinite(price[np.arange(len(rest)), best])
        if not can.any():
            break
        taken[rest[can], flat.item[best[can]]] = best[can]
    return taken


def improve(flat: Flat, choice: Choice) -> Choice:
    """A feasible choice after changes of one item or of two at once, each the one that lowers the loss most; where none
    does, one that leaves it equal and lowers the cost, relative to the limits, or else the first number that changes.
    """
    problem, best = flat.problem, np.inf

    def better(found: Choice) -> bool:
        if not problem.is_feasible(found):
            return False
        loss, rounding = problem.loss(found), problem.rounding(choice)
        if abs(loss - best) > rounding:
            return loss < best
        return (problem.relative_cost(found), found) < (problem.relative_cost(choice), choice)

    while True:
        best = min(best, problem.loss(choice))
        found = next(filter(better, _candidates(flat, choice)), None)
        if found is None:
            return choice
        choice = found


def _candidates(flat: Flat, choice: Choice) -> Iterator[Choice]:
    """Changes worth a look, as sums here are rounded: those that seem to lower the loss, the best one first, then those
    that seem to keep it and to lower the cost or the number of the first item changed."""
    taken, problem = flat.taken(choice), flat.problem
    current, columns = taken[flat.item], np.arange(len(flat.item))
    move = (flat.item[:, None] < flat.item) & (columns != current)[:, None] & (columns != current)
    move[columns, current] = columns != current  # one item alone: beside it, what its item has now stays

    def both(change: np.ndarray) -> np.ndarray:
        return change[:, None] + change

    for cost, allowed in zip(flat.cost, flat.allowed, strict=True):
        move &= both(cost - cost[current]) <= allowed - cost[taken].sum()
    given = flat.given(taken[None])[0]
    loss = both(given - given[current])
    if flat.pairs is not None:
        of, (one, other) = flat.pairs, flat.ends
        instead, beside = current[one], current[other]
        loss[one, other] += of[one, other] - of[one, beside] - of[instead, other] + of[instead, beside]
    loss[~move] = np.inf

    def changed(where: int) -> Choice:
        one, other = divmod(int(where), len(columns))
        found = taken.copy()
        found[flat.item[[other, one]]] = other, one
        return flat.choice(found)

    equal = len(taken) * problem.rounding(choice)
    if loss.min() < -equal:
        yield changed(loss.argmin())
        lower = np.flatnonzero(loss < -equal)
        yield from map(changed, lower[loss.ravel()[lower].argsort(kind="stable")])
    cheaper = both(flat.relative - flat.relative[current])
    noise = len(columns) * EPS
    first = (columns < current)[:, None]
    ties = np.flatnonzero((abs(loss) <= equal) & ((cheaper < -noise) | ((cheaper <= noise) & first)))
    yield from map(changed, ties[cheaper.ravel()[ties].argsort(kind="stable")])
