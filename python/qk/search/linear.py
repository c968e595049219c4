"""A problem as a linear program in integers, for HiGHS.

x[i, a] is 1 where item i has option a. A pair is the local polytope: y[a, b] has the row sums x[i, a] and the column
sums x[j, b], so that integer x leave it one value. Its relaxation is tighter than that of y >= x[i, a] + x[j, b] - 1
with y below both, and it is solved faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from qk.errors import fail
from qk.search.flat import Flat
from qk.search.problem import STAGE, Choice, Problem

SPREAD = 1e4  # what the loss, and each cost, can vary by as HiGHS sees it,
TOLERANCE = 1e-6  # and its tolerance for rows, integers and the loss: 1e-10 of that
RETRIES = 50  # choices above a limit by less than that, each then forbidden


class Program:
    """Minimize loss over x [N] and y, all from 0 to 1. equal, at_most: matrix and right side of the rows.

    spread: at least what the problem's loss can vary by. base + unit * loss: the problem's loss.
    """

    def __init__(self, problem: Problem) -> None:
        self.flat = flat = Flat(problem)
        matrices, least = list(problem.pairs.values()), flat.least(flat.loss)
        self.spread = float(flat.spread(flat.loss) + sum(np.ptp(matrix) for matrix in matrices))
        self.base = float(least.sum() + sum(matrix.min() for matrix in matrices))
        self.unit = self.spread / SPREAD or 1.0
        above = [flat.loss - least[flat.item], *(matrix.ravel() - matrix.min() for matrix in matrices)]
        self.loss = np.concatenate(above) / self.unit
        self.equal, self.at_most = _structure(flat), _limits(flat, len(self.loss))

    def relax(self) -> tuple[np.ndarray, np.ndarray] | None:
        """x [N] of the relaxation, and a floor [N]: no choice with this option loses less. None if nothing is feasible.

        The floor holds for any multipliers of the rows, hence in spite of the solver's tolerances: rows hold for every
        choice, so that it loses at least what they weigh, and what its columns lose beyond their rows' weights.
        """
        from scipy.optimize import linprog  # here: importing qk need not wait for it

        (equal, right), (at_most, most) = self.equal, self.at_most
        found = linprog(self.loss, at_most, most, equal, right, bounds=(0, 1), method="highs")
        if found.status == 2:
            return None
        _check(found)
        of_limits = np.minimum(found.ineqlin.marginals, 0)
        beyond = self.loss - equal.T @ found.eqlin.marginals - at_most.T @ of_limits
        least = right @ found.eqlin.marginals + most @ of_limits + np.minimum(beyond, 0).sum()
        options = len(self.flat.item)
        return found.x[:options], self.base + self.unit * (least + np.maximum(beyond[:options], 0))

    def branch_and_bound(self) -> Choice | None:
        """The best choice; None if nothing is feasible. Gap: TOLERANCE of SPREAD, as the relative one is set to 0."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        flat, options = self.flat, len(self.flat.item)
        (equal, right), (at_most, most) = self.equal, self.at_most
        rows = [LinearConstraint(equal, right, right), LinearConstraint(at_most, -np.inf, most)]
        integer = np.arange(len(self.loss)) < options
        for _ in range(RETRIES):
            with _silent():
                found = milp(
                    self.loss, integrality=integer, bounds=Bounds(0, 1), constraints=rows, options={"mip_rel_gap": 0}
                )
            if found.status == 2:
                return None
            _check(found)
            taken = np.flatnonzero(found.x[:options] > 0.5)
            if flat.problem.is_feasible(flat.choice(taken)):
                return flat.choice(taken)
            forbidden = np.isin(np.arange(len(self.loss)), taken)
            rows.append(LinearConstraint(forbidden, -np.inf, len(taken) - 1))
        got = f"{RETRIES} choices above by less than {TOLERANCE / SPREAD:.0e} of what the cost varies by"
        raise fail(STAGE, "limits", "further from what choices cost", got, "Lower them by that much.")


def _structure(flat: Flat) -> tuple[object, np.ndarray]:
    """One option of each item; the sums of each pair's rows, then of its columns."""
    options, items = len(flat.item), len(flat.count)
    entries = [(flat.item, np.arange(options), 1.0)]  # row, column, value
    row, column = items, options
    for (i, j), matrix in flat.problem.pairs.items():
        y = column + np.arange(matrix.size).reshape(matrix.shape)
        of_rows = row + np.arange(len(matrix))
        of_columns = row + len(matrix) + np.arange(matrix.shape[1])
        entries += [(of_rows, flat.columns(i), -1.0), (of_columns, flat.columns(j), -1.0)]
        entries += [(of_rows[:, None], y, 1.0), (of_columns, y, 1.0)]
        row, column = row + sum(matrix.shape), column + matrix.size
    right = np.zeros(row)
    right[:items] = 1
    return _sparse(entries, (row, column)), right


def _limits(flat: Flat, columns: int) -> tuple[object, np.ndarray]:
    """Those that some choice breaks, counted from the smallest cost of each item on."""
    from scipy import sparse

    least, spread = flat.least(flat.cost), flat.spread(flat.cost)
    room = flat.allowed - least.sum(1)
    at = np.flatnonzero(spread > np.maximum(room, 0))
    scale = SPREAD / spread[at]
    matrix = np.zeros((len(at), columns))
    matrix[:, : len(flat.item)] = (flat.cost - least[:, flat.item])[at] * scale[:, None]
    return sparse.csr_array(matrix), room[at] * scale


def _sparse(entries: list[tuple[np.ndarray, np.ndarray, float]], shape: tuple[int, int]) -> object:
    from scipy import sparse

    filled = [[part.ravel() for part in np.broadcast_arrays(*entry)] for entry in entries]
    rows, columns, values = (np.concatenate(parts) for parts in zip(*filled, strict=True))
    return sparse.csr_array((values, (rows, columns)), shape=shape)


def _check(found: object) -> None:
    if not found.success:
        raise RuntimeError(f"{STAGE}: HiGHS stopped: {found.message}")


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps back what the process prints: HiGHS has a line that no option turns off (jump-dev/HiGHS.jl#312), and prints
    it past sys.stdout, where it would end up in what a command line hands on."""
    try:
        stdout = os.dup(1)
    except OSError:  # there is none
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(nothing)
        os.close(stdout)
