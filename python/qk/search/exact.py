"""The best choice: relaxation, then branch and bound over the options that it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qk.errors import QkError, fail
from qk.search.flat import Flat
from qk.search.linear import TOLERANCE, Program
from qk.search.moves import improve, repair
from qk.search.problem import STAGE, Choice, Problem


def exact(problem: Problem) -> Choice:
    """The feasible choice of least loss.

    Least is proven to 1e-10 of what the loss can vary by over the options that the relaxation leaves; limits are kept
    in float64. Of equal losses the lower cost relative to the limits, then the lower numbers, as far as changes of one
    or two items lead there.
    Raises QkError for limits that no choice keeps, with the nearest ones that some choice does.
    """
    choice = solve(problem)
    if choice is None:
        raise infeasible(problem)
    return choice


def solve(problem: Problem) -> Choice | None:
    """As exact; None where no choice keeps the limits."""
    flat = Flat(problem)
    least = flat.least(flat.cost)
    keep = (least.sum(1)[:, None] - least[:, flat.item] + flat.cost <= flat.allowed[:, None]).all(0)
    if not np.logical_or.reduceat(keep, flat.first).all():
        return None
    best: Choice | None = None
    for branch in (False, True):  # what rounding finds leaves branch and bound few options
        spread = math.inf
        # Again while what was ruled out makes the scale finer: beside a loss of 1e9 a difference of 1e-9 is nothing.
        while (program := Program(_only(problem, flat, keep))).spread < spread / 10:
            spread, kept = program.spread, np.flatnonzero(keep)
            relaxed = program.relax()
            if relaxed is None:
                return None
            x, floor = relaxed
            found = program.branch_and_bound() if branch else _rounded(program.flat, x)
            if found is not None:
                found = flat.choice(kept[program.flat.taken(found)])
                best = min(best or found, found, key=problem.loss)
            elif branch:
                return None
            if best is not None:
                rounding = len(flat.count) * problem.rounding(best) + TOLERANCE * program.unit
                keep[kept] = floor <= problem.loss(best) + rounding
    return improve(flat, best)


def _only(problem: Problem, flat: Flat, keep: np.ndarray) -> Problem:
    """With the options to keep [N], and the costs that are limited."""
    numbers = [np.flatnonzero(keep[flat.columns(item)]) for item in range(len(flat.count))]

    def part(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [values[of] for values, of in zip(arrays, numbers, strict=True)]

    costs = {name: part(problem.costs[name]) for name in problem.limits}
    pairs = {(i, j): matrix[np.ix_(numbers[i], numbers[j])] for (i, j), matrix in problem.pairs.items()}
    return Problem(part(problem.losses), costs, problem.limits, pairs)


def _rounded(flat: Flat, x: np.ndarray) -> Choice | None:
    """The largest of each item's x, made to fit and improved; None where it cannot be made to."""
    taken = np.array([columns[x[columns].argmax()] for columns in map(flat.columns, range(len(flat.count)))])
    choice = flat.choice(repair(flat, taken[None])[0])
    return improve(flat, choice) if flat.problem.is_feasible(choice) else None


def infeasible(problem: Problem) -> QkError:
    """The error for limits that no choice keeps, with the nearest that one does: of each limit that is too low by
    itself what the cheapest options cost; else of each the least that the others allow; else, where raising one is not
    enough, limits that can be kept together, each the least that those before it allow."""
    limits, lowest = problem.limits, {name: math.fsum(map(min, problem.costs[name])) for name in problem.limits}
    needed = {name: value for name, value in lowest.items() if value > problem.allowed[name]}
    if needed:
        return _refused(needed, " and ", {name: limits[name] for name in needed}, "")
    for name in limits:
        value = _least(problem, name, {other: limit for other, limit in limits.items() if other != name})
        if value is not None:
            needed[name] = value
    if needed:
        return _refused(needed, " or ", limits, ", which no choice keeps together")
    kept: dict[str, float] = {}
    for name, limit in limits.items():
        kept[name] = max(limit, _least(problem, name, kept))
    needed = {name: value for name, value in kept.items() if value > limits[name]}
    return _refused(needed, " and ", limits, ", which no choice keeps together")


def _refused(needed: Mapping[str, float], join: str, limits: Mapping[str, float], why: str) -> QkError:
    expected = join.join(f"{value!r} for {name}" for name, value in needed.items())
    got = " and ".join(f"{limit!r} for {name}" for name, limit in limits.items())
    return fail(STAGE, "limits", f"at least {expected}", got + why, "Raise them, or offer cheaper options.")


def _least(problem: Problem, name: str, limits: Mapping[str, float]) -> float | None:
    """The smallest sum of a cost under these limits; None where no choice keeps them."""
    choice = solve(Problem(problem.costs[name], problem.costs, limits))
    return None if choice is None else problem.cost(name, choice)
