"""The exact solver finds what trying all finds, keeps every limit, and says what would be feasible."""

import os

import numpy as np
import pytest

from knapsacks import COSTS, GAINS, UNITS, WORKED, additive, best_of_all, layers, small, things, tried
from qk.errors import QkError
from qk.search import linear
from qk.search.exact import exact
from qk.search.flat import Flat
from qk.search.moves import improve
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
    for seed, problem, expected in tried(block):
        if expected is None:
            with pytest.raises(QkError, match="limits must be at least"):
                exact(problem)
        else:
            assert exact(problem) == expected, seed


def correlated(seed, items=60):
    """One limit, whole costs, and losses that fall almost in step with them: a hard knapsack, of which a gap of 1e-4
    takes another choice. Its least loss is by dynamic programming."""
    random = np.random.default_rng(seed)
    costs = np.sort(random.integers(1, 1000, (items, 3)), 1)
    losses = -(costs + 100 * np.arange(3) + random.random((items, 3)))
    capacity = int(costs[:, 0].sum() + 0.4 * (costs[:, 2] - costs[:, 0]).sum())
    lowest = np.zeros(capacity + 1)  # by capacity, of the items so far
    for of, at in zip(losses, costs, strict=True):
        options = [(loss, np.r_[np.full(cost, np.inf), lowest]) for loss, cost in zip(of, at, strict=True)]
        lowest = np.min([loss + before[: capacity + 1] for loss, before in options], 0)
    return Problem(losses, {"size": costs}, {"size": capacity}), lowest[-1]


@pytest.mark.parametrize("seed", [3, 5])
def test_equals_dynamic_programming(seed):
    problem, least = correlated(seed)
    # Each of the sums of up to 60 terms rounds once.
    assert problem.loss(exact(problem)) == pytest.approx(least, rel=60 * 2**-53)


def test_small_losses_count_beside_those_that_can_be_avoided():
    problem, least = correlated(5, items=30)
    # Options that cost nothing: 1e9 is beyond every choice, 1 beyond the best, and the others differ by 1e-9.
    losses = [[1e9, 1.0, *(1e-9 * x / 1e3)] for x in problem.losses]
    costs = {"size": [[0, 0, *x] for x in problem.costs["size"]]}
    choice = exact(Problem(losses, costs, problem.limits))
    assert problem.loss(tuple(np.subtract(choice, 2))) == pytest.approx(least, rel=30 * 2**-53)


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
    # 0.1 + 0.2 is above 0.3 by rounding alone.
    equal = Problem([[0.3, 0.1], [0.0, 0.2]], {"size": [[2, 1], [2, 1]]}, {"size": 4}, {(0, 1): [[0, 9], [9, 0]]})
    assert equal.loss((1, 1)) > equal.loss((0, 0))
    assert exact(equal) == (1, 1)


def test_of_equal_costs_the_lower_numbers():
    assert exact(Problem([[1, 1], [2, 2]], {"size": [[5, 5], [2, 2]]}, {"size": 9})) == (0, 0)
    assert exact(additive([1, 1, 1], [1, 1, 1], 1)) == (0, 0, 1)  # 0 before 1, and the first item before the last


def few_values(seed):
    """Up to 5 items whose losses and costs are small whole numbers, with many ties; feasible."""
    random = np.random.default_rng(seed)
    options = random.integers(1, 4, random.integers(2, 6))
    losses, costs = ([random.integers(0, 4, count) for count in options] for _ in range(2))
    return Problem(losses, {"size": costs}, {"size": sum(map(min, costs)) + random.integers(5)})


def test_no_change_of_two_items_is_left_that_keeps_the_loss_and_lowers_the_cost():
    for seed in range(100):
        problem = few_values(seed)
        choice, expected = exact(problem), best_of_all(problem)
        assert problem.loss(choice) == problem.loss(expected)
        assert improve(Flat(problem), choice) == choice
        if len(choice) == 2:
            assert choice == expected


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_losses_of_any_magnitude(scale):
    for seed in range(20):
        problem = small(seed)
        pairs = {key: scale * matrix for key, matrix in problem.pairs.items()}
        scaled = Problem([scale * x for x in problem.losses], problem.costs, problem.limits, pairs)
        expected = best_of_all(problem)
        assert expected is None or exact(scaled) == expected


def test_what_the_solver_prints_is_kept_back(capfd):
    with linear._silent():
        os.write(1, b"of HiGHS")
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"
