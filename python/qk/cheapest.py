"""Accuracy first: the cheapest plan that loses no more than a user allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qk.curve import Curve, Point
from qk.errors import fail
from qk.judge import ROUNDING, Evaluate, How, Judge
from qk.progress import Progress
from qk.search.choose import Chosen, Kind, Solver
from qk.search.latency import LatencyTable
from qk.search.show import UNITS
from qk.spec import Plan, Recipe
from qk.tables import Table

STAGE = "qk.cheapest"
BUDGETS = 64  # whose plans are looked among: about seven are judged
WIDEST = "widest"
PLAN = "plan.json"  # in the folder


@dataclass(frozen=True)
class Cheapest:
    """point: the cheapest plan that was judged and keeps the accuracy. tried: all that were judged. reasons: of each
    layer, why it has its widths."""

    point: Point
    tried: Curve
    reasons: dict[str, str]

    @property
    def plan(self) -> Plan:
        """Of the point."""
        return self.point.plan

    def table(self) -> Table:
        """Widths of each layer, and why."""
        rows = [[name, spec.describe(), self.reasons[name]] for name, spec in self.plan.layers.items()]
        return Table("Widths", ["layer", "widths", "why"], rows)


def cheapest(
    model: nn.Module,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    evaluate: Evaluate,
    lose: float = 0.005,
    cost: str = "latency_ms",
    sensitivity: Kind = "fisher",
    solver: Solver = "exact",
    seed: int = 0,
    table: LatencyTable | str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    title: str = "",
    **options: Any,
) -> Cheapest:
    """The cheapest plan whose deployed network loses at most so much accuracy to the float model.

    evaluate: model -> share of labels met, in [0, 1]. lose: of that share, 0.005 for half a point. Plans for 64 budgets
    of the cost are lined up, and halved until the cheapest that keeps the accuracy is found: about seven are quantized
    as the recipe says and judged. A layer is narrowed where that makes the network cheaper alone. cost, recipe,
    sensitivity, solver, seed, table, options: as for qk.pareto; so is out, whose plan.json is the plan that was found.
    Raises QkError where the widest plan loses more already, with what it loses, and as qk.pareto does.
    """
    if not callable(evaluate):
        raise fail(STAGE, "evaluate", "a function of the model that gives a share of labels met", repr(evaluate))
    if not isinstance(lose, int | float) or not 0 <= lose < 1:
        raise fail(STAGE, "lose", "a share in [0, 1)", lose, "Half a point is 0.005.")
    how = How(sensitivity, solver, seed, table, options)
    judge = Judge(STAGE, model, batches, recipe, (cost,), how, evaluate, out, title, {"lose": lose})
    floating = judge.curve.floating
    assert floating is not None
    plans = _plans(judge, cost)
    with Progress("auto" if progress else "off", STAGE, len(plans).bit_length() + 1, None) as shown:

        def keeps(number: int) -> Point | None:
            name, one = plans[number]
            shown.unit(name)
            point = judge.add(name, one)
            shown.finish(1, f"accuracy {point.quality:.4g}, float {floating:.4g}")
            return point if point.quality >= floating - lose - ROUNDING else None

        found = keeps(len(plans) - 1)
        if found is None:
            got = f"{lose}, where the widest plan loses {floating - judge.curve.points[0].quality:.4g}"
            raise fail(STAGE, "lose", "what some plan keeps", got, "Allow more, offer wider widths, or learn rounding.")
        first, last = 0, len(plans) - 1  # the cheapest that keeps it is among these; the last does
        while first < last:
            middle = (first + last) // 2
            point = keeps(middle)
            if point is None:
                first = middle + 1
            else:
                last, found = middle, point
    chosen = plans[last][1]
    if judge.folder is not None:
        chosen.plan.save(judge.folder / PLAN)
    return Cheapest(found, judge.finish(), _reasons(judge, cost, chosen))


def _plans(judge: Judge, cost: str) -> list[tuple[str, Chosen]]:
    """The different plans for budgets from the least on, the cheapest first; all layers at their widest last."""
    choice = (0,) * len(judge.search.items)
    widest = judge.search.chosen(choice, judge.losses.of(choice))
    cheaper = [plan for plan in judge.plans(cost, BUDGETS).items() if plan[1].costs[cost] < widest.costs[cost]]
    return [*sorted(cheaper, key=lambda plan: plan[1].costs[cost]), (WIDEST, widest)]


def _reasons(judge: Judge, cost: str, chosen: Chosen) -> dict[str, str]:
    """Of each layer: what its widths save, or why it was not narrowed."""
    search, unit = judge.search, UNITS[cost]
    costs, losses = search.costs(cost).items, judge.losses.losses
    reasons = {name: spec.reason or "as the recipe has it" for name, spec in chosen.plan.layers.items()}
    for item, own, loss, option in zip(search.items, costs, losses, chosen.choice, strict=True):
        narrowest = min(range(len(own)), key=own.__getitem__)
        if option:
            reason = f"saves {own[0] - own[option]:.3g} {unit} of {own[0]:.3g}"
        elif own[narrowest] >= own[0]:
            reason = "no narrower width costs less"
        else:
            more = loss[narrowest] - loss[0]
            reason = f"would save {own[0] - own[narrowest]:.3g} {unit} at most, for a loss of {more:.3g}"
        reasons |= dict.fromkeys(item.layers, reason)
    return reasons
