"""search: the width of every layer, by what it costs and what it loses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qk.prepare.prepared import Prepared
from qk.search.choose import Chosen, Kind, Search, Solver
from qk.search.latency import LatencyTable
from qk.spec import Budget, Plan

__all__ = ["Chosen", "LatencyTable", "Search", "search"]


def search(
    p: Prepared,
    batches: Iterable,
    budget: Budget,
    sensitivity: Kind = "fisher",
    solver: Solver = "exact",
    *,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """The width of every layer: the plan that loses least within the budget.

    sensitivity: how losses are estimated, "fisher" (BRECQ's), "alps", "hessian" (HAWQ's), "eagl", or the controls
    "random" and "cost_only". solver: "exact" or the "genetic" one of BRECQ. options: of Search, which keeps what was
    found for further budgets. Then: qk.apply_plan(p, plan), qk.calibrate, qk.reconstruct, qk.convert.
    Raises QkError for a budget that no choice keeps, with the nearest that one does, and as Search does.
    """
    return Search(p, batches, **options).plan(budget, sensitivity, solver, seed).plan
