"""From a budget to a plan: what each width costs and loses is found once, then any number of budgets is solved for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from qk.calibrate.batches import hold
from qk.deploy import FusedModel, convert, fuse
from qk.errors import QkError, fail
from qk.inputs import resized
from qk.methods.resume import facts
from qk.prepare.prepared import Prepared, check_prepared
from qk.search.alps import alps, alps_learned, alps_trained, check_train
from qk.search.bank import Bank, check_ranges
from qk.search.cost import Costs, bit_operation_costs, size_costs
from qk.search.exact import exact
from qk.search.fisher import fisher
from qk.search.genetic import genetic
from qk.search.hessian import hessian
from qk.search.items import STAGE, find_items, plan_of
from qk.search.latency import LatencyTable, latency_costs, network_times
from qk.search.parts import Folder, Parts
from qk.search.problem import Problem
from qk.search.sensitivity import Sensitivity, chance, cost_only, eagl
from qk.spec import Budget, Plan, Ranges

Kind = Literal["fisher", "alps", "alps_learned", "alps_trained", "hessian", "eagl", "random", "cost_only"]
Solver = Literal["exact", "genetic"]
TRIES = 6  # of plans that are measured for one limit on latency
NEARER = 0.995  # by which a limit that was missed is set lower than it was missed by


@dataclass(frozen=True)
class Chosen:
    """choice: number of the option of each item. costs: of the whole network, as predicted. loss: what sensitivities
    expect. measured_ms: latency of the fused network, in units of the table's run, where latency is limited."""

    plan: Plan
    choice: tuple[int, ...]
    costs: dict[str, float]
    loss: float
    measured_ms: float | None = None


def check_solver(solver: str) -> None:
    """Raises QkError for one that there is not."""
    if solver not in get_args(Solver):
        raise fail(STAGE, "solver", f"one of {', '.join(get_args(Solver))}", repr(solver))


class Search:
    """Items, sensitivities and costs of one model, each found when it is first asked for.

    p: from qk.prepare, as it is before smoothing and calibration; it stays as it is. batches, max_batches, memory_mb:
    as for reconstruct. weights, activations: the widths to choose from, every pair of them, or, tied, the first with
    the first and so on. keep: name patterns of layers that stay as p.plan has them; None: the first and the last ones.
    ranges: as for calibrate, without lapq. table: of latencies; what it lacks is measured here and added to it.
    latency_batch: how many samples a call has whose latency is limited.
    train: labelled data as for qk.tune, for the sensitivity alps_trained.
    folder: sensitivities are written there, and taken from there where it has them already. One that is not whole goes
    on; other processes that were given the same folder, model and data share its work.
    Raises QkError for widths that no kernel has, and for a model with nothing to choose.
    """

    def __init__(
        self,
        p: Prepared,
        batches: Iterable,
        *,
        weights: Sequence[int] = (2, 4, 8),
        activations: Sequence[int] = (8,),
        tied: bool = False,
        keep: Sequence[str] | None = None,
        ranges: Ranges = "mse",
        table: LatencyTable | str | Path | None = None,
        latency_batch: int = 1,
        max_batches: int | None = None,
        memory_mb: int = 1024,
        folder: str | Path | None = None,
        train: Iterable | None = None,
    ) -> None:
        check_prepared(p, STAGE)
        if not isinstance(latency_batch, int) or latency_batch < 1:
            raise fail(STAGE, "latency_batch", "at least 1", latency_batch)
        self.p, self.memory_mb, self.latency_batch = p, memory_mb, latency_batch
        self.table = LatencyTable() if table is None else table
        if not isinstance(self.table, LatencyTable):
            self.table = LatencyTable.load(self.table)
        self.items = find_items(p, weights, activations, tied, keep)
        self.batches = hold(batches, STAGE, max_batches, memory_mb)
        self.ranges, self.train = ranges, train
        check_ranges(p, ranges)
        self.folder = None if folder is None else Folder(folder, self._facts())
        self._costs: dict[str, Costs] = {}
        self._sensitivities: dict[tuple[str, int], Sensitivity] = {}
        self._widest: FusedModel | None = None

    @cached_property
    def bank(self) -> Bank:
        """The model at all widths, calibrated when it is first asked for."""
        return Bank(self.p, self.items, self.batches, self.ranges)

    def sensitivity(self, kind: Kind = "fisher", seed: int = 0) -> Sensitivity:
        """What each option of each item loses. seed: of draws."""
        kinds: dict[str, Callable[[Parts], Sensitivity]] = {
            "fisher": lambda parts: fisher(self.bank, self.batches, seed=seed, parts=parts),
            "alps": lambda parts: alps(self.bank, self.batches, self.memory_mb, parts),
            "alps_learned": lambda parts: alps_learned(self.bank, self.batches, self.memory_mb, parts, seed),
            "alps_trained": lambda parts: alps_trained(self.bank, self.train, parts, seed),
            "hessian": lambda parts: hessian(self.bank, self.batches, seed=seed, parts=parts),
            "eagl": lambda _: eagl(self.bank),
            "random": lambda _: chance(self.items, seed),
            "cost_only": lambda _: cost_only(self.items),
        }
        if kind not in kinds:
            raise fail(STAGE, "sensitivity", f"one of {', '.join(kinds)}", repr(kind))
        if kind == "alps_trained":  # before the model is calibrated at all widths
            check_train(self.train)
        if (kind, seed) not in self._sensitivities:
            find = kinds[kind]
            found = self.folder.sensitivity(kind, seed, find) if self.folder else find(Parts())
            self._sensitivities[kind, seed] = found
        return self._sensitivities[kind, seed]

    def costs(self, name: str) -> Costs:
        """size_mb, latency_ms or giga_bit_ops."""
        kinds: dict[str, Callable[[], Costs]] = {
            "size_mb": lambda: size_costs(self.p, self.items, self.batches[0]),
            "latency_ms": lambda: latency_costs(self.bank, self._inputs(), self.table),
            "giga_bit_ops": lambda: bit_operation_costs(self.p, self.items),
        }
        if name not in self._costs:
            self._costs[name] = kinds[name]()
        return self._costs[name]

    def plan(
        self, budget: Budget, sensitivity: Kind | Sensitivity = "fisher", solver: Solver = "exact", seed: int = 0
    ) -> Chosen:
        """The options of least loss within the budget. Where it limits latency and the table is of this machine, the
        fused network is measured beside that of all widest, and the limit lowered until it is kept.

        Raises QkError for a budget that no choice keeps, with the nearest that one does.
        """
        check_solver(solver)
        if not isinstance(budget, Budget):
            raise fail(STAGE, "budget", "a qk.Budget", type(budget).__name__)
        limits = self._limits(budget)
        found = self.sensitivity(sensitivity, seed) if isinstance(sensitivity, str) else sensitivity
        chosen = self.solve(limits, found, solver, seed)
        if "latency_ms" not in limits or self.table.is_foreign:
            return chosen
        wanted, best = limits["latency_ms"], math.inf
        for _ in range(TRIES):
            measured = self.measured_ms(chosen.choice)
            if measured <= wanted:
                return replace(chosen, measured_ms=measured)
            best = min(best, measured)
            limits["latency_ms"] *= NEARER * wanted / measured
            try:
                chosen = self.solve(limits, found, solver, seed)
            except QkError:  # nothing is faster
                break
        got = f"{wanted:.4g}, where {best:.4g} was the least that plans for it took when measured"
        raise fail(STAGE, "latency_ms", f"at least {best:.4g}", got, "Raise it, or free the machine of other work.")

    def uniform(self, weights: int, activations: int) -> Chosen:
        """Every item at these widths, or at the nearest wider ones that it can have."""
        wanted = (weights, activations)
        choice = [next((i for i, o in reversed([*enumerate(item.options)]) if o >= wanted), 0) for item in self.items]
        return self.chosen(tuple(choice))

    def chosen(self, choice: tuple[int, ...], loss: float = math.nan) -> Chosen:
        """A choice with its plan and the costs that are known."""
        costs = {name: costs.of(choice) for name, costs in self._costs.items()}
        return Chosen(plan_of(self.p, self.items, choice), choice, costs, loss)

    def measured_ms(self, choice: tuple[int, ...]) -> float:
        """Latency of the fused network, measured beside that of all widest and in units of the table's run."""
        widest = (0,) * len(self.items)
        if self._widest is None:
            self._widest = self._fused(widest)
        ours, reference = network_times([self._fused(choice), self._widest], self._inputs())
        return ours.whole / reference.whole * self.costs("latency_ms").of(widest)

    def _fused(self, choice: tuple[int, ...]) -> FusedModel:
        self.bank.put(choice)
        return fuse(convert(self.bank.p), self._inputs())

    def _facts(self) -> dict[str, Any]:
        """What the bits of sensitivities depend on."""
        items = {item.name: [list(option) for option in item.options] for item in self.items}
        p = self.p
        more = {"joins": {name: list(readers) for name, readers in p.joins.items()}, "unclipped": list(p.unclipped)}
        more |= {"tables": {name: repr(spec) for name, spec in p.tables.items()}}
        return facts(p, p.units, self.batches) | {"items": items, "ranges": self.ranges} | more

    def _inputs(self) -> Any:
        return resized(self.batches[0], self.latency_batch)

    def _limits(self, budget: Budget) -> dict[str, float]:
        """In the units of costs: the lower of a limit and a share."""
        found = {}
        for name, (absolute, share) in budget.limits().items():
            widest = self.costs(name).of([0] * len(self.items))
            found[name] = min(x for x in (absolute, share and share * widest) if x is not None)
        return found

    def solve(self, limits: dict[str, float], sensitivity: Sensitivity, solver: str = "exact", seed: int = 0) -> Chosen:
        """The options of least loss within predicted costs: of each cost the most, in its unit. As `plan`, without
        measuring."""
        check_solver(solver)
        # Behind the items one of a single option, which stands for everything else.
        costs = {name: [*self.costs(name).items, [self.costs(name).rest]] for name in limits}
        problem = Problem([*sensitivity.losses, [0.0]], costs, limits, sensitivity.pairs)
        choice = exact(problem) if solver == "exact" else genetic(problem, seed)
        return self.chosen(tuple(choice[:-1]), problem.loss(choice))
