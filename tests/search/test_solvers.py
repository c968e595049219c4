"""Both solvers against the sheet's examples, against trying everything, and at the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import qk
from qk.search.exact import exact
from qk.search.genetic import genetic
from qk.search.problem import Problem

SOLVERS = pytest.mark.parametrize("solve", [exact, genetic])

GAINS, EXTRA = (1.9, 2.6, 3.1, 1.2, 2.2), (40, 90, 160, 30, 60)  # of staying wide, for five items


@SOLVERS
@pytest.mark.parametrize(
    ("capacity", "value", "wide", "cost"),
    [(120, 4.1, {1, 5}, 100), (200, 6.7, {1, 2, 5}, 190), (250, 7.9, {1, 2, 4, 5}, 220)],
)
def test_the_knapsack_of_the_sheet(solve, capacity, value, wide, cost):
    losses = [[-gain, 0.0] for gain in GAINS]
    choice = solve(Problem(losses, {"macs": [[float(x), 0.0] for x in EXTRA]}, {"macs": float(capacity)}))
    assert {i + 1 for i, option in enumerate(choice) if option == 0} == wide
    assert sum(GAINS[i - 1] for i in wide) == pytest.approx(value)
    assert sum(EXTRA[i - 1] for i in wide) == cost


def instance(seed, magnitude=1.0):
    """A small one: 2 to 5 items of 1 to 4 options, 1 to 3 limits, pairs of either sign."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5, random.integers(2, 6))
    losses = [magnitude * random.normal(size=n) for n in counts]
    names = ("size", "latency", "bit_ops")[: random.integers(1, 4)]
    costs = {name: [random.random(n) * 10.0 ** random.integers(-3, 8) for n in counts] for name in names}
    limits = {}
    for name, rows in costs.items():
        low, high = sum(row.min() for row in rows), sum(row.max() for row in rows)
        limits[name] = low + (high - low) * random.uniform(0.2, 0.9)
    every = list(itertools.combinations(range(len(counts)), 2))
    pairs = {p: magnitude * random.normal(size=(counts[p[0]], counts[p[1]])) for p in every if random.random() < 0.4}
    return Problem(losses, costs, limits, pairs)


def tried(problem):
    """The least loss of all that keep the limits; None where none does."""
    choices = itertools.product(*(range(len(row)) for row in problem.losses))
    return min((problem.loss(c) for c in choices if problem.is_feasible(c)), default=None)


@SOLVERS
@pytest.mark.parametrize("block", range(10))
def test_small_problems_are_solved_as_by_trying_everything(solve, block):
    for seed in range(20 * block, 20 * block + 20):
        problem = instance(seed, magnitude=10.0 ** (seed % 19 - 9))
        least = tried(problem)
        if least is None:
            with pytest.raises(qk.QkError, match="which no choice keeps together"):
                solve(problem)
            continue
        choice = solve(problem)
        assert problem.is_feasible(choice)
        assert problem.loss(choice) == least


def layered(seed, items=200, limits=3):
    """Wider options cost more and lose less, with diminishing returns, as layers do."""
    random = np.random.default_rng(seed)
    bits, size = np.array([8.0, 4.0, 3.0, 2.0]), random.lognormal(0, 1, items)
    losses = [worth * 4.0**-bits for worth in random.lognormal(0, 1.5, items)]
    costs = {
        name: [s * bits * random.uniform(0.7, 1.3, 4).round(2).cumprod().clip(0.5, 1) for s in size]
        for name in ("size", "latency", "bit_ops")[:limits]
    }
    spans = {name: (sum(r.min() for r in rows), sum(r.max() for r in rows)) for name, rows in costs.items()}
    return Problem(losses, costs, {name: low + 0.4 * (high - low) for name, (low, high) in spans.items()})


@pytest.mark.parametrize("seed", range(3))
def test_a_network_of_200_layers(seed):
    """Genetic: at least 99.5 % of what exact takes off the loss of the cheapest options."""
    problem = layered(seed)
    best, found = exact(problem), genetic(problem)
    cheapest = problem.loss(tuple(int(sum(rows).argmin()) for rows in zip(*problem.costs.values(), strict=True)))
    assert problem.is_feasible(best)
    assert problem.is_feasible(found)
    assert problem.loss(best) <= problem.loss(found)
    assert cheapest - problem.loss(found) >= 0.995 * (cheapest - problem.loss(best))


@SOLVERS
def test_a_limit_that_is_just_met_is_kept(solve):
    thirds = [[0.1, 0.0], [0.2, 0.0], [0.3, 0.0]]  # 0.1 + 0.2 + 0.3 is above 0.6 in floats
    problem = Problem([[-1.0, 0.0]] * 3, {"size": thirds}, {"size": 0.6})
    assert solve(problem) == (0, 0, 0)
    assert solve(Problem([[-1.0, 0.0]] * 3, {"size": thirds}, {"size": 0.6 - 1e-12})) != (0, 0, 0)


@SOLVERS
def test_of_equal_losses_the_cheaper_then_the_lower_number(solve):
    costs = {"size": [[2.0, 1.0, 1.0], [1.0, 1.0, 3.0]]}
    assert solve(Problem([[0.0] * 3] * 2, costs, {"size": 9.0})) == (1, 0)


@SOLVERS
def test_items_of_one_option_and_no_limit(solve):
    assert solve(Problem([[5.0], [2.0, 1.0]])) == (0, 1)
    assert solve(Problem([[5.0]], {"size": [[3.0]]}, {"size": 3.0})) == (0,)


@SOLVERS
def test_costs_of_0(solve):
    assert solve(Problem([[1.0, 0.0], [1.0, 0.0]], {"size": [[0.0, 0.0]] * 2}, {"size": 0.0})) == (1, 1)


@SOLVERS
def test_what_no_choice_keeps_is_refused_with_the_nearest(solve):
    losses = [[0.0, 1.0]] * 2
    costs = {"size": [[4.0, 1.0]] * 2, "latency": [[1.0, 4.0]] * 2}
    with pytest.raises(qk.QkError, match=r"limits must be at least 2\.0 for size, got 1\.5 for size"):
        solve(Problem(losses, costs, {"size": 1.5, "latency": 9.0}))
    # Each alone is kept, by all narrow or all wide; together the nearest are one narrow and one wide, or all of one.
    says = r"at least 8\.0 for size or 8\.0 for latency, got 4\.0 for size and 4\.0 for latency, which no choice keeps"
    with pytest.raises(qk.QkError, match=says):
        solve(Problem(losses, costs, {"size": 4.0, "latency": 4.0}))


def test_the_same_seed_finds_the_same():
    assert genetic(layered(0), seed=3) == genetic(layered(0), seed=3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([],), "at least one item"),
        (([[]],), "with at least one"),
        (([[1.0], [math.nan]],), "finite"),
        (([[1.0]], {"size": [[1.0, 2.0]]}), "as its losses"),
        (([[1.0]], {"size": [[-1.0]]}), "0 or more"),
        (([[1.0]], {"size": [[1.0]]}, {"time": 1.0}), "on costs that there are"),
        (([[1.0]], {"size": [[1.0]]}, {"size": math.inf}), "finite"),
        (([[1.0]] * 2, {}, {}, {(1, 0): [[0.0]]}), "of items i < j"),
        (([[1.0]] * 2, {}, {}, {(0, 1): [[0.0, 1.0]]}), "options of 0"),
    ],
)
def test_what_is_no_problem_is_refused(arguments, says):
    with pytest.raises(qk.QkError, match=says):
        Problem(*arguments)


@pytest.mark.parametrize("fields", [{"population": 1}, {"generations": -1}, {"mutation": 1.5}])
def test_what_is_no_genetic_search_is_refused(fields):
    with pytest.raises(qk.QkError):
        genetic(layered(0, 3), **fields)
