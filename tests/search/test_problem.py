"""Sums, limits and what is refused."""

import numpy as np
import pytest

from qk.errors import QkError
from qk.search.problem import Problem

LOSSES = [[1.0, 2.0], [4.0], [8.0, 16.0, 32.0]]
COSTS = {"size": [[1, 2], [4], [8, 16, 32]], "latency": [[3, 1], [0], [5, 2, 1]]}


def test_worked_sums():
    problem = Problem(LOSSES, COSTS, {"size": 22}, {(0, 2): [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]]})
    assert problem.loss((1, 0, 1)) == 2 + 4 + 16 - 0.2
    assert problem.loss((0, 0, 2)) == 1 + 4 + 32 + 0.3
    assert (problem.cost("size", (1, 0, 1)), problem.cost("latency", (1, 0, 1))) == (22, 3)
    assert problem.relative_cost((1, 0, 1)) == 1  # latency has no limit
    assert problem.is_feasible((1, 0, 1))
    assert not problem.is_feasible((0, 0, 2))


def test_every_limit_counts():
    problem = Problem(LOSSES, COSTS, {"size": 22, "latency": 2})
    assert not problem.is_feasible((1, 0, 1))
    assert not problem.is_feasible((1, 0, 2))


def test_a_limit_added_up_from_the_costs_is_kept():
    limit = sum([0.1] * 10)
    assert limit < 1  # as the exact sum of ten times 0.1 is not
    assert Problem([[0.0]] * 10, {"size": [[0.1]] * 10}, {"size": limit}).is_feasible((0,) * 10)
    assert not Problem([[0.0]] * 10, {"size": [[0.1]] * 10}, {"size": limit * (1 - 1e-14)}).is_feasible((0,) * 10)


def test_the_order_of_items_does_not_change_a_sum():
    values = np.random.default_rng(0).normal(size=(100, 1)) * 10.0 ** np.arange(-50, 50)[:, None]
    forwards = Problem(values, {"size": abs(values)}, {})
    backwards = Problem(values[::-1], {"size": abs(values[::-1])}, {})
    assert forwards.loss((0,) * 100) == backwards.loss((0,) * 100)
    assert forwards.cost("size", (0,) * 100) == backwards.cost("size", (0,) * 100)


def test_arrays_are_copied():
    mine = [np.array([1.0, 2.0])]
    problem = Problem(mine)
    mine[0][0] = 5
    assert problem.loss((0,)) == 1
    with pytest.raises(ValueError, match="read-only"):
        problem.losses[0][0] = 5


def test_a_choice_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        Problem(LOSSES, COSTS).loss((0, 0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"losses": []}, "losses must be those of at least one item, got none"),
        ({"losses": [[1.0, 2.0], [], [1.0] * 3]}, r"losses of item 1 must be \[options\] with at least one, got \[0\]"),
        ({"losses": [[1.0, 2.0], [np.nan], [1.0] * 3]}, "losses of item 1 must be finite"),
        ({"losses": [["a"]]}, "losses of item 0 must be numbers, got"),
        ({"costs": {"size": [[1, 2], [3]]}}, "costs 'size' must be of 3 items, as the losses, got 2"),
        ({"costs": {"size": [[1, 2], [3, 4], [1] * 3]}}, r"of item 1 must be \[1\], as its losses, got \[2\]"),
        ({"costs": {"size": [[1, 2], [-3], [1] * 3]}}, "of item 1 must be 0 or more, got -3"),
        ({"costs": {"size": [[1, 2], [np.inf], [1] * 3]}}, "costs 'size' of item 1 must be finite"),
        ({"limits": {"sise": 3}}, r"limits must be on costs that there are \(size, latency\), got 'sise'"),
        ({"limits": {"size": np.inf}}, "the limit on size must be finite, got inf. Leave it out"),
        ({"pairs": {(1, 1): [[1.0]]}}, r"pairs must be of items i < j below 3, got \(1, 1\)"),
        ({"pairs": {(1, 3): [[1.0]]}}, r"pairs must be of items i < j below 3, got \(1, 3\)"),
        ({"pairs": {(0, 1): [[1.0, 2.0]]}}, r"\[options of 0, options of 1\], \[2, 1\], got \[1, 2\]"),
        ({"pairs": {(0, 1): [[1.0], [np.nan]]}}, r"the pair \(0, 1\) must be finite"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(QkError, match=r"qk.search: .*" + words):
        Problem(**{"losses": LOSSES, "costs": COSTS, **fields})
