"""Repair finds the limits, and improve the best choice within two changes."""

from itertools import combinations, product

import numpy as np
import pytest

from knapsacks import best_of_all, layers, small
from qk.search.flat import Flat
from qk.search.moves import improve, repair
from qk.search.problem import EPS, Problem


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_many_choices_are_those_of_each(seed):
    problem = small(seed)
    flat = Flat(problem)
    choices = list(product(*(range(len(losses)) for losses in problem.losses)))
    taken = np.array([flat.taken(choice) for choice in choices])
    # Losses of at most 5 items and 10 pairs, of about 1 each; every pair twice, and once again for the items.
    assert np.allclose(flat.losses(taken), [problem.loss(choice) for choice in choices], rtol=0, atol=1e-13)
    assert flat.fits(taken).tolist() == [problem.is_feasible(choice) for choice in choices]
    assert [flat.choice(row) for row in taken] == choices


def test_what_fits_by_the_room_for_rounding_alone_does_not_fit():
    met = sum([0.1] * 10)
    for limit, fits in ((met, True), (met * (1 - 10 * EPS), False)):
        flat = Flat(Problem([[0.0]] * 10, {"size": [[0.1]] * 10}, {"size": limit}))
        assert (flat.costs(flat.first) <= flat.allowed).all()
        assert flat.fits(flat.first[None]).tolist() == [fits]


def test_repair_keeps_what_fits_and_brings_the_rest_within_the_limits():
    problem = layers(0, items=30)
    flat = Flat(problem)
    cheapest, widest = np.zeros(30, dtype=int), np.full(30, 3)
    repaired = repair(flat, np.array([flat.taken(cheapest), flat.taken(widest)]))
    assert flat.choice(repaired[0]) == tuple(cheapest)
    assert problem.is_feasible(flat.choice(repaired[1]))
    assert problem.loss(flat.choice(repaired[1])) < problem.loss(tuple(cheapest))


@pytest.mark.parametrize("seed", [seed for seed in range(40) if best_of_all(small(seed))])
def test_no_change_of_two_items_is_better_after_improve(seed):
    problem = small(seed)
    flat, random = Flat(problem), np.random.default_rng(seed)
    start = next(filter(problem.is_feasible, iter(lambda: tuple(random.integers(flat.count).tolist()), None)))
    found = improve(flat, start)
    assert problem.is_feasible(found)
    assert problem.loss(found) <= problem.loss(start)
    for items in combinations(range(len(found)), min(2, len(found))):
        for options in product(*(range(flat.count[item]) for item in items)):
            changed = list(found)
            for item, option in zip(items, options, strict=True):
                changed[item] = option
            if problem.is_feasible(changed):
                assert problem.loss(changed) >= problem.loss(found) - problem.rounding(found)
