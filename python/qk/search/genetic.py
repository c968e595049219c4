"""BRECQ's genetic search for a choice of low loss.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021), on mixed
precision; no code was published. Different from it: a child that breaks a limit is drawn again at most REDRAWS times,
then repaired; of equal choices one is kept; every PERIOD generations and at the end some are improved by changes of one
or two items, in most an item and all those it has a pair with are drawn anew before. Without that, networks of 200
layers end about 2 % short of what the exact choice gains over the cheapest options; with it none that was tried, also
with strong pairs, is as much as 0.5 % short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qk.errors import fail
from qk.search.exact import exact
from qk.search.flat import Flat
from qk.search.moves import improve, repair
from qk.search.problem import STAGE, Choice, Problem

REDRAWS = 10  # of what breaks a limit
PERIOD = 5  # generations after which IMPROVED choices are improved: any, as the best ones alone are too much alike
IMPROVED = 3


def genetic(
    problem: Problem, seed: int = 0, population: int = 50, generations: int = 100, mutation: float = 0.1
) -> Choice:
    """A feasible choice of low loss, for a seed always the same.

    population: choices that live on, of which the better half are parents: of as many children half by uniform
    crossover of two, half by mutation of one. mutation: probability that an item's option is drawn anew.
    Raises QkError as exact, and for numbers out of range.
    """
    _check(population, generations, mutation)
    flat, random = Flat(problem), np.random.default_rng(seed)

    def anyone(count: int) -> np.ndarray:
        return flat.first + (random.random((count, len(flat.count))) * flat.count).astype(int)

    linked = np.eye(len(flat.count), dtype=bool)
    for i, j in problem.pairs:
        linked[i, j] = linked[j, i] = True

    def disturbed(taken: np.ndarray) -> np.ndarray:
        anew = linked[random.integers(len(linked), size=len(taken))]
        anew[0] = False
        found = repair(flat, np.where(anew, anyone(len(taken)), taken))
        return found[flat.fits(found)]

    def parents(count: int) -> np.ndarray:
        better = living[: (population + 1) // 2]
        return better[random.integers(len(better), size=count)]

    def crossed(count: int) -> np.ndarray:
        one, other = parents(count), parents(count)
        return np.where(random.random(one.shape) < 0.5, one, other)

    def mutated(count: int) -> np.ndarray:
        one = parents(count)
        return np.where(random.random(one.shape) < mutation, anyone(count), one)

    living = _fitting(flat, anyone, population)
    if not len(living):  # rare, and only with several limits
        living = flat.taken(exact(replace(problem, losses=[0 * x for x in problem.losses], pairs={})))[None]
    living = _best(flat, living, population)
    for generation in range(1, generations + 1):
        children = [_fitting(flat, crossed, population // 2), _fitting(flat, mutated, population - population // 2)]
        living = _best(flat, np.concatenate([living, *children]), population)
        if generation % PERIOD == 0:
            some = living[random.choice(len(living), min(IMPROVED, len(living)), replace=False)]
            better = [flat.taken(improve(flat, flat.choice(taken))) for taken in disturbed(some)]
            living = _best(flat, np.concatenate([living, better]), population)
    return min((improve(flat, flat.choice(taken)) for taken in living[:IMPROVED]), key=problem.loss)


def _check(population: int, generations: int, mutation: float) -> None:
    if population < 2:
        raise fail(STAGE, "population", "at least 2", population)
    if generations < 0:
        raise fail(STAGE, "generations", "0 or more", generations)
    if not 0 <= mutation <= 1:
        raise fail(STAGE, "mutation", "a probability", mutation)


def _fitting(flat: Flat, draw: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Up to `count` choices: what breaks a limit is drawn again, then repaired, and left out if that is in vain."""
    found = draw(count)
    for _ in range(REDRAWS):
        broken = ~flat.fits(found)
        if not broken.any():
            return found
        found[broken] = draw(int(broken.sum()))
    found = repair(flat, found)
    return found[flat.fits(found)]


def _best(flat: Flat, taken: np.ndarray, count: int) -> np.ndarray:
    """Different choices, the lowest losses first."""
    different = np.unique(taken, axis=0)
    return different[flat.losses(different).argsort(kind="stable")[:count]]
