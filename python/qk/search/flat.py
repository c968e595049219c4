"""A problem with the options of all items side by side, for sums over many choices at once."""

from __future__ import annotations

import numpy as np

from qk.search.problem import EPS, Choice, Problem


class Flat:
    """Each of the N options of a problem is a column; a choice is the column that it takes of each item.

    item: [N], whose option a column is. first, count: [items], the first column of each, and how many it has.
    loss: [N]. cost: [limits, N]; allowed: [limits]. relative: [N], costs in units of their limits, added up. pairs:
    [N, N], symmetric, 0 where two options have no term; ends: the columns of each term, that of the first item first.
    Without terms pairs is None.
    Sums here are rounded term by term and allowed has room for that; where a hair decides, the problem is asked.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = np.array([len(x) for x in problem.losses])
        self.first = np.cumsum(self.count) - self.count
        self.item = np.repeat(np.arange(len(self.count)), self.count)
        self.loss = np.concatenate(problem.losses)
        cost = [np.concatenate(problem.costs[name]) for name in problem.limits]
        self.cost = np.reshape(cost, (len(cost), len(self.loss)))
        self._strict, self._hair = np.array(list(problem.allowed.values())), (len(self.count) + 3) * EPS
        self.allowed = self._strict * (1 + self._hair)
        self.relative = np.zeros(len(self.loss))
        for row, limit in zip(self.cost, problem.limits.values(), strict=True):
            self.relative += row / limit if limit > 0 else 0
        self.pairs: np.ndarray | None = None
        if problem.pairs:
            self.pairs = np.zeros((len(self.loss), len(self.loss)))
            terms = [(self.columns(i)[:, None], self.columns(j), matrix) for (i, j), matrix in problem.pairs.items()]
            flat = zip(*([part.ravel() for part in np.broadcast_arrays(*term)] for term in terms), strict=True)
            one, other, values = map(np.concatenate, flat)
            self.pairs[one, other] = self.pairs[other, one] = values
            self.ends = one, other

    def columns(self, item: int) -> np.ndarray:
        """Of an item's options."""
        return np.arange(self.first[item], self.first[item] + self.count[item])

    def taken(self, choice: Choice) -> np.ndarray:
        """[items], the columns of a choice."""
        return self.first + np.array(choice)

    def choice(self, taken: np.ndarray) -> Choice:
        """The inverse of `taken`."""
        return tuple((taken - self.first).tolist())

    def least(self, values: np.ndarray) -> np.ndarray:
        """[..., N] -> [..., items], the smallest of each item's options."""
        return np.minimum.reduceat(values, self.first, -1)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[..., N] -> [...]: by how much the sum over a choice can vary."""
        return (np.maximum.reduceat(values, self.first, -1) - self.least(values)).sum(-1)

    def costs(self, taken: np.ndarray) -> np.ndarray:
        """[..., items] -> [limits, ...]."""
        return self.cost[:, taken].sum(-1)

    def fits(self, taken: np.ndarray) -> np.ndarray:
        """[choices, items] -> [choices], whether a choice is feasible."""
        costs = self.costs(taken)
        found = (costs <= self.allowed[:, None]).all(0)
        close = (costs >= self._strict[:, None] * (1 - self._hair)).any(0)
        for row in np.flatnonzero(found & close):
            found[row] = self.problem.is_feasible(self.choice(taken[row]))
        return found

    def given(self, taken: np.ndarray) -> np.ndarray:
        """[choices, items] -> [choices, N]: what each option adds to the loss beside the other items' choices."""
        if self.pairs is None:
            return np.broadcast_to(self.loss, (len(taken), len(self.loss)))
        chosen = np.zeros((len(taken), len(self.loss)))
        np.put_along_axis(chosen, taken, 1.0, 1)
        return self.loss + chosen @ self.pairs

    def losses(self, taken: np.ndarray) -> np.ndarray:
        """[choices, items] -> [choices]. A pair's term is given to both of its items, and counts once."""
        alone = self.loss[taken].sum(1)
        return alone if self.pairs is None else (alone + np.take_along_axis(self.given(taken), taken, 1).sum(1)) / 2
