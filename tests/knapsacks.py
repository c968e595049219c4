"""Problems of qk.search, and their best choice by trying all."""

from __future__ import annotations

from itertools import product

import numpy as np

from qk.search.problem import Problem

UNITS = {"size": 1e7, "latency": 1e-3, "bit_ops": 1.0}  # bytes, seconds, and none, so that magnitudes differ


def best_of_all(problem):
    """The choice that `exact` promises; None where no choice is feasible."""
    everything = product(*(range(len(losses)) for losses in problem.losses))
    found = filter(problem.is_feasible, everything)
    return min(found, key=lambda c: (problem.loss(c), problem.relative_cost(c), c), default=None)


def small(seed):
    """Up to 5 items of up to 4 options, one to three limits, which some choices or none keep, and pairs of any sign."""
    random = np.random.default_rng(seed)
    options = random.integers(1, 5, random.integers(1, 6))
    names = list(UNITS)[: random.integers(1, 4)]
    costs = {name: [UNITS[name] * random.random(count).round(2) for count in options] for name in names}
    limits = {name: between(costs[name], random.uniform(-0.02, 1)) for name in names}
    places = [(i, j) for j in range(len(options)) for i in range(j) if random.random() < 0.4]
    pairs = {(i, j): random.normal(size=(options[i], options[j])) for i, j in places}
    return Problem([random.normal(size=count) for count in options], costs, limits, pairs)


def tried(block):
    """Twenty of `small`: the seed, the problem, and its best choice by trying all."""
    for seed in range(20 * block, 20 * block + 20):
        problem = small(seed)
        yield seed, problem, best_of_all(problem)


def layers(seed, items=200, block=0):
    """A network: wider options cost more and lose less, with diminishing returns; costs are measured with noise.

    block: so many layers in a row have terms for each pair of them, of either sign.
    """
    random = np.random.default_rng(seed)
    weights, inputs = np.array([2, 4, 4, 8]), np.array([4, 4, 8, 8])

    def noise(spread, *shape):
        return np.exp(spread * random.normal(size=shape))

    parameters = np.round(np.exp(10) * noise(1, items, 1))
    products = parameters * np.round(np.exp(4) * noise(0.8, items, 1))
    losses = noise(1, items, 1) * (4.0**-weights + noise(0.5, items, 1) * 4.0**-inputs) * noise(0.3, items, 4)
    costs = {
        "size": parameters * weights / 8,
        "latency": 1e-9 * products * (1 + np.maximum(weights, inputs)) * noise(0.1, items, 4),
        "bit_ops": products * weights * inputs,
    }
    limits = {name: between(cost, random.uniform(0.2, 0.7)) for name, cost in costs.items()}
    pairs = {}
    for j in range(items if block else 0):
        for i in range(j - j % block, j):
            strength = np.sqrt(np.outer(losses[i] - losses[i].min(), losses[j] - losses[j].min()))
            pairs[i, j] = 0.5 * random.normal() * strength * noise(0.2, 4, 4)
    return Problem(losses, costs, limits, pairs)


def reached(problem, choice, best):
    """What the choice gains over the cheapest options, in parts of what the best one gains."""
    relative = sum(np.array(problem.costs[name]) / limit for name, limit in problem.limits.items())
    worst = problem.loss(tuple(relative.argmin(1)))
    return (worst - problem.loss(choice)) / (worst - problem.loss(best))


def between(costs, part):
    """A limit: the sum of the smallest costs at 0, of the largest at 1."""
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return least + part * (most - least)


def additive(gains, costs, capacity):
    """A knapsack of things to take (option 1) or to leave."""
    return Problem([[0, -gain] for gain in gains], {"size": [[0, cost] for cost in costs]}, {"size": capacity})


# The sheet's, with greedy taking things 1 and 4 of the first for a gain of 3.1: (capacity, gain, things, cost).
GAINS, COSTS = (1.9, 2.6, 3.1, 1.2, 2.2), (40, 90, 160, 30, 60)
WORKED = [(120, 4.1, {1, 5}, 100), (200, 6.7, {1, 2, 5}, 190), (250, 7.9, {1, 2, 4, 5}, 220)]


def things(choice):
    """Numbers from 1 on."""
    return {number for number, option in enumerate(choice, 1) if option}
