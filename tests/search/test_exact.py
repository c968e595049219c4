"""The exact solver finds what trying all finds, keeps every limit, and says what would be feasible."""

import os

import numpy as np
import pytest

from knapsacks import COSTS, GAINS, UNITS, WORKED, additive, best_of_all, layers, small, things
from qk.errors import QkError
from qk.search import linear
from qk.search.exact import exact
from qk.search.problem import Problem


@pytest.mark.parametrize(("capacity", "gain", "taken", "cost"), WORKED)
def test_worked_knapsack(capacity, gain, taken, cost):
    problem = additive(GAINS, COSTS, capacity)
    choice = exact(problem)
    assert things(choice) == taken
    assert problem.loss(choice) == pytest.approx(-gain, rel=1e-15)  # decimals of which each is rounded
    assert problem.cost("size", choice) == cost


@pytest.mark.parametrize("block", range(10))
def test_equals_trying_all(block):
    for seed in range(20 * block, 20 * block + 20):
        problem = small(seed)
        expected = best_of_all(problem)
        if expected is None:
            with pytest.raises(QkError, match="limits must be at least"):
                exact(problem)
        else:
            assert exact(problem) == expected, seed


def test_equals_dynamic_programming():
    random = np.random.default_rng(0)
    losses, costs, capacity = random.normal(size=(60, 3)), random.integers(0, 50, (60, 3)), 1000
    lowest = np.zeros(capacity + 1)  # by capacity, of the items so far
    for of, at in zip(losses, costs, strict=True):
        options = [(loss, np.r_[np.full(cost, np.inf), lowest]) for loss, cost in zip(of, at, strict=True)]
        lowest = np.min([loss + before[: capacity + 1] for loss, before in options], 0)
    problem = Problem(losses, {"size": costs}, {"size": capacity})
    # Each of 60 sums rounds once, of terms of about 1 that add up to less than 100.
    assert problem.loss(exact(problem)) == pytest.approx(lowest[-1], rel=0, abs=60 * 100 * 2**-53)


def test_a_network_of_200_layers():
    problem = layers(0)
    choice = exact(problem)
    assert problem.is_feasible(choice)
    x, floor = linear.Program(problem).relax()
    assert floor.min() <= problem.loss(choice)
    # At most two options of three items are between 0 and 1 in the relaxation, so that it is close for 200.
    assert problem.loss(choice) - floor.min() < 0.01 * (problem.loss((0,) * 200) - floor.min())
    assert np.sum((x > 1e-6) & (x < 1 - 1e-6)) <= 6


def test_the_same_choice_again():
    problem = layers(1, items=40, block=4)
    assert exact(problem) == exact(problem)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_without_limits_each_item_has_its_least_loss():
    assert exact(Problem([[3.0, 1.0, 2.0], [5.0], [0.0, -1.0]])) == (1, 0, 1)


def test_one_item_of_one_option():
    assert exact(Problem([[7.0]], {"size": [[3]]}, {"size": 3})) == (0,)


@pytest.mark.parametrize("unit", [1e7, 1, 1e-3])
def test_a_limit_that_is_just_met(unit):
    # Ten times a tenth, added up, is below the exact sum; a choice of eleven tenths is the next one.
    costs, limit = [[0.1 * unit, 0.2 * unit]] * 9, sum([0.1 * unit] * 10)
    problem = Problem([[1.0, 0.0]] * 9, {"size": costs}, {"size": limit})
    assert sum(exact(problem)) == 1


def test_a_choice_above_by_less_than_the_tolerance_is_not_taken():
    # Two of the three would fit by HiGHS's tolerance, 1e-10 of the costs, in each of three ways.
    problem = additive([3, 2, 1], [1, 1, 1], 2 * (1 - 1e-12))
    assert exact(problem) == (1, 0, 0)


def test_more_such_choices_than_are_tried_are_refused(monkeypatch):
    monkeypatch.setattr(linear, "RETRIES", 5)
    problem = additive(1 + np.arange(20) / 1000, [1] * 20, 10 * (1 - 1e-12))
    with pytest.raises(QkError, match=r"limits must be .*, got 5 choices above by less than 1e-10"):
        exact(problem)


def test_zero_costs_and_a_limit_of_zero():
    problem = Problem([[1.0, 0.0], [1.0, 0.0]], {"size": [[0, 1e-9], [0, 0]]}, {"size": 0})
    assert exact(problem) == (0, 1)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"size": 2}, "at least 3.0 for size, got 2.0 for size. Raise them, or offer cheaper options"),
        ({"size": 2, "latency": 9}, "at least 3.0 for size, got 2.0 for size"),
        ({"size": 2, "latency": 1}, "at least 3.0 for size and 2.0 for latency, got 2.0 for size and 1.0 for latency"),
        ({"size": 3, "latency": 3}, "at least 5.0 for size or 4.0 for latency, got 3.0 for size and 3.0 for latency"),
    ],
)
def test_infeasible_limits_are_refused_with_the_nearest_feasible(limits, words):
    costs = {"size": [[1, 3], [2, 4]], "latency": [[2, 1], [2, 1]]}
    problem = Problem([[0.0, 0.0]] * 2, costs, limits)
    with pytest.raises(QkError, match=f"qk.search: limits must be {words}"):
        exact(problem)


def test_limits_of_which_more_than_one_must_be_raised():
    costs = {"size": [[0, 1, 1]], "latency": [[1, 0, 1]], "bit_ops": [[1, 1, 0]]}
    problem = Problem([[0.0] * 3], costs, dict.fromkeys(costs, 0))
    with pytest.raises(QkError, match=r"at least 1.0 for latency and 1.0 for bit_ops, got .*no choice keeps together"):
        exact(problem)


@pytest.mark.parametrize("seed", range(30))
def test_the_limit_that_the_error_names_is_feasible(seed):
    random = np.random.default_rng(seed)
    costs = {name: unit * random.random((6, 3)) for name, unit in UNITS.items()}
    limits = {name: sum(map(min, cost)) * 1.02 for name, cost in costs.items()}
    problem = Problem(random.random((6, 3)), costs, limits)
    with pytest.raises(QkError, match="no choice keeps together") as error:
        exact(problem)
    needed = str(error.value).split("at least ")[1].split(", got")[0]
    for way in needed.split(" or "):
        raised = {part.split(" for ")[1]: float(part.split(" for ")[0]) for part in way.split(" and ")}
        assert exact(Problem(problem.losses, costs, {**limits, **raised}))
        for name, value in raised.items():
            with pytest.raises(QkError):
                exact(Problem(problem.losses, costs, {**limits, **raised, name: value * (1 - 1e-9)}))


# --- ties and magnitudes ----------------------------------------------------------------------------------------------


def test_of_equal_losses_the_lower_cost():
    problem = Problem([[1, 1, 1], [2, 2, 2]], {"size": [[5, 3, 4], [2, 2, 1]]}, {"size": 9})
    assert exact(problem) == (1, 2)
    assert exact(Problem([[0.3, 0.1], [0.0, 0.2]], {"size": [[2, 1], [1, 1]]}, {"size": 9})) == (1, 0)
    # 0.1 + 0.2 and 0.3 are equal but for rounding.
    equal = Problem([[0.1, 0.3], [0.2, 0.0]], {"size": [[2, 1], [2, 1]]}, {"size": 3}, {(0, 1): [[0, 9], [9, 0]]})
    assert exact(equal) == (1, 1)


def test_of_equal_costs_the_lower_numbers():
    assert exact(Problem([[1, 1], [2, 2]], {"size": [[5, 5], [2, 2]]}, {"size": 9})) == (0, 0)
    assert exact(additive([1, 1, 1], [1, 1, 1], 1)) == (0, 0, 1)  # 0 before 1, and the first item before the last


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_losses_of_any_magnitude(scale):
    for seed in range(20):
        problem = small(seed)
        pairs = {key: scale * matrix for key, matrix in problem.pairs.items()}
        scaled = Problem([scale * x for x in problem.losses], problem.costs, problem.limits, pairs)
        expected = best_of_all(problem)
        assert expected is None or exact(scaled) == expected


@pytest.mark.parametrize("seed", range(20))
def test_losses_of_1e_minus_9_count_beside_losses_of_1e9_that_can_be_avoided(seed):
    random = np.random.default_rng(seed)
    losses = [[1e9, *1e-9 * random.random(3)] for _ in range(7)]
    costs = {name: unit * random.random((7, 4)) for name, unit in UNITS.items()}
    limits = {name: sum(map(max, cost)) * 0.6 for name, cost in costs.items()}
    problem = Problem(losses, costs, limits)
    assert exact(problem) == best_of_all(problem)
    assert problem.loss(exact(problem)) < 1e-8


def test_what_the_solver_prints_is_kept_back(capfd):
    with linear._silent():
        os.write(1, b"of HiGHS")
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"
