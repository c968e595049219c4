"""The curve of what a network can cost and how good it then is: plans for many budgets, each quantized and judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qk.calibrate.batches import hold
from qk.calibrate.objective import first_tensor, task_loss
from qk.errors import fail
from qk.files import replace_file, writable_folder, write_json
from qk.flow import quantize, share_met
from qk.inputs import digest, evaluating, feed
from qk.machine import qk_version
from qk.methods.resume import ANEW, batches_digest, differences
from qk.prepare import prepare
from qk.progress import Progress
from qk.search.choose import Chosen, Kind, Search, Solver
from qk.search.latency import LatencyTable
from qk.search.show import UNITS
from qk.spec import Plan, Recipe, checked_recipe
from qk.tables import Table

STAGE = "qk.pareto"
FEWEST = 2  # budgets of a curve
ALL = "all "  # how the names of plans begin whose layers have one pair of widths
ROUNDING = 1e-9  # by which sums of costs in another order may differ
FILE, PAGE, LATENCIES, PLANS = "curve.json", "curve.html", "latencies.json", "plans"


@dataclass(frozen=True)
class Point:
    """A plan, what it costs and what it keeps. name: the budget that it is for, or the widths that all layers have.

    costs: as predicted. measured_ms: latency of its fused network, where latency was asked for. expected_loss: what the
    sensitivities say. quality: accuracy of the deployed network (the fused one where there is one), a share of 1; or
    its divergence from the float model's output on the calibration batches.
    """

    name: str
    plan: Plan
    costs: dict[str, float]
    expected_loss: float
    quality: float
    measured_ms: float | None = None

    @property
    def uniform(self) -> bool:
        """Whether it is the plan of all layers at one pair of widths."""
        return self.name.startswith(ALL)

    def cost(self, name: str) -> float:
        """As measured where it was, else as predicted."""
        return self.measured_ms if name == "latency_ms" and self.measured_ms is not None else self.costs[name]

    @property
    def file(self) -> str:
        """Of its plan, in the folder of the curve."""
        return f"{self.name.replace(' ', '_')}.json"


@dataclass(frozen=True)
class Curve:
    """points: of every budget of every cost, and of all layers at one pair of widths; those of one plan are one.

    judged: "accuracy", more is better, or "divergence", less is. floating: accuracy of the float model.
    """

    title: str
    judged: str
    costs: tuple[str, ...]
    points: list[Point] = field(default_factory=list)
    floating: float | None = None

    @property
    def by_cost(self) -> list[Point]:
        """The points in the order of their first cost."""
        return sorted(self.points, key=lambda p: p.costs[self.costs[0]])

    def front(self, cost: str) -> list[Point]:
        """The points that no other beats in both, from the cheapest on."""
        best, found = None, []
        for point in sorted(self.points, key=lambda p: (p.cost(cost), self._loss(p))):
            if best is None or self._loss(point) < best:
                best = self._loss(point)
                found.append(point)
        return found

    def table(self) -> Table:
        """Every point with its costs; "best for" names the costs on whose front it is."""
        fronts = {cost: {point.name for point in self.front(cost)} for cost in self.costs}
        timed = any(point.measured_ms is not None for point in self.points)
        head = ["plan", *(UNITS[cost] for cost in self.costs), *["ms measured"] * timed, self.unit, "best for"]
        rows = []
        for p in self.by_cost:
            ms = [None if p.measured_ms is None else f"{p.measured_ms:.4g}"] * timed
            on = ", ".join(cost for cost in self.costs if p.name in fronts[cost])
            rows.append([p.name, *(f"{p.costs[cost]:.4g}" for cost in self.costs), *ms, self.shown(p.quality), on])
        if self.floating is not None:
            rows.append(["float", *[None] * (len(self.costs) + timed), self.shown(self.floating), None])
        return Table("Pareto", head, rows)

    @property
    def unit(self) -> str:
        """Of what plans are judged by."""
        return "accuracy, %" if self.judged == "accuracy" else "divergence from float"

    def shown(self, quality: float) -> str:
        """In that unit."""
        return f"{100 * quality:.2f}" if self.judged == "accuracy" else f"{quality:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "title": self.title,
            "judged": self.judged,
            "costs": list(self.costs),
            "floating": self.floating,
            "points": [asdict(p) | {"plan": p.plan.to_dict(), "uniform": p.uniform} for p in self.points],
        }

    def save(self, path: str | Path) -> Path:
        """The page: one HTML file with a plot for each cost, whose points show their widths and hold their plans."""
        from qk.curve_page import curve_page

        try:
            return replace_file(path, curve_page(self).encode())
        except OSError as error:
            raise fail(STAGE, str(path), "a place that can be written", error.strerror or error) from error

    def _loss(self, point: Point) -> float:
        return -point.quality if self.judged == "accuracy" else point.quality


def pareto(
    model: nn.Module,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    costs: Sequence[str] = ("size_mb", "latency_ms"),
    budgets: int = 8,
    evaluate: Callable[[nn.Module], float] | None = None,
    sensitivity: Kind = "fisher",
    solver: Solver = "exact",
    seed: int = 0,
    table: LatencyTable | str | Path | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    title: str = "",
    **options: Any,
) -> Curve:
    """What the model keeps at so many budgets of each cost, spread evenly between what it costs at its cheapest and at
    its widest, beside all layers at one pair of widths.

    Each plan is quantized as the recipe says (qk.quantize; methods nearest, gptq or brecq, which takes its time for
    every plan), fused where it can be, and judged by evaluate: model -> share of labels met, in [0, 1]; without it by
    the divergence from the float model's output on the batches. costs: of size_mb, latency_ms, giga_bit_ops. table:
    latencies, as Search takes them; options: its others, such as weights and activations.
    out: a folder for curve.json, curve.html, a plan for each point, which qk quantize --plan takes, and the latencies.
    The same call goes on there after it was killed, with what was judged; another call is refused.
    Raises QkError as Search and qk.quantize do.
    """
    recipe = checked_recipe(recipe, STAGE)
    _check(recipe, costs, budgets)
    held = hold(batches, STAGE, None, recipe.memory_mb)
    run = {
        "qk": qk_version(),
        "torch": torch.__version__,
        "recipe": recipe.to_dict(),
        "options": repr((sorted(options.items()), tuple(costs), budgets, sensitivity, solver, seed, evaluate is None)),
        "model": digest(sorted(model.state_dict().items())),
        "batches": batches_digest(held),
    }
    folder = None if out is None else writable_folder(out, STAGE)
    judged = {} if folder is None else _judged(folder / FILE, run)
    if table is None and folder is not None and (folder / LATENCIES).exists():
        table = folder / LATENCIES
    ranges = "mse" if recipe.ranges == "lapq" else recipe.ranges  # lapq depends on the whole plan
    search = Search(prepare(model, held[0], recipe), held, ranges=ranges, table=table, **options)
    chosen = _chosen(search, costs, budgets, sensitivity, solver, seed)
    if folder is not None and "latency_ms" in costs:
        search.table.save(folder / LATENCIES)
    floating, kind = None, "divergence"
    if evaluate is not None:
        kind = "accuracy"
        with evaluating(model):
            floating = share_met(evaluate, model, STAGE)
    curve = Curve(title or type(model).__name__, kind, tuple(costs), [], floating)
    with Progress("auto" if progress else "off", STAGE, len(chosen), len(chosen)) as shown:
        for name, one in chosen.items():
            shown.unit(name)
            key = json.dumps(one.plan.to_dict())
            if key not in judged:
                found = quantize(model, held, recipe, plan=one.plan, measure=False, progress=False)
                judged[key] = _quality(model, found.fused or found.model, held, evaluate)
            quality = judged[key]
            timed = "latency_ms" in costs and not search.table.is_foreign
            measured = search.measured_ms(one.choice) if timed else None
            curve.points.append(Point(name, one.plan, one.costs, one.loss, quality, measured))
            if folder is not None:
                one.plan.save(folder / PLANS / curve.points[-1].file)
                write_json(folder / FILE, {"run": run, "qualities": judged} | curve.to_dict(), STAGE)
            shown.finish(1, f"{kind} {quality:.4g}")
    if folder is not None:
        curve.save(folder / PAGE)
    return curve


def divergence(model: nn.Module, found: nn.Module, batches: list) -> float:
    """Of found's output from model's, for a sample of the batches: see qk.calibrate.objective.task_loss."""
    total, samples = 0.0, 0
    with evaluating(model), evaluating(found), torch.no_grad():
        for batch in batches:
            expected, got = first_tensor(feed(model, batch), STAGE), first_tensor(feed(found, batch), STAGE)
            total += float(task_loss(got, expected, batch))
            samples += len(expected)
    return total / samples


def _quality(model: nn.Module, found: nn.Module, batches: list, evaluate: Callable | None) -> float:
    if evaluate is None:
        return divergence(model, found, batches)
    with evaluating(found):
        return share_met(evaluate, found, STAGE)


def _chosen(
    search: Search, costs: Sequence[str], budgets: int, kind: Kind, solver: Solver, seed: int
) -> dict[str, Chosen]:
    """Name -> plan: all layers at each pair of widths, then what is best for each budget where that is another."""
    losses = search.sensitivity(kind, seed)
    found: dict[tuple[int, ...], tuple[str, Chosen]] = {}
    for cost in costs:  # now, so that every choice is given all of them
        search.costs(cost)
    for w, a in sorted({option for item in search.items for option in item.options}, reverse=True):
        choice = search.uniform(w, a).choice
        found.setdefault(choice, (f"{ALL}W{w}A{a}", search.chosen(choice, losses.of(choice))))
    for cost in costs:
        of = search.costs(cost)
        least = of.rest + sum(map(min, of.items))
        most = of.rest + sum(map(max, of.items))
        for k in range(budgets):
            limit = least + (most - least) * k / (budgets - 1)
            one = search.solve({cost: limit * (1 + ROUNDING)}, losses, solver, seed)
            found.setdefault(one.choice, (f"{cost} {limit:.4g}", one))
    return dict(found.values())


def _judged(path: Path, run: dict[str, Any]) -> dict[str, float]:
    """What a curve that was begun there found: quality by plan. Raises QkError where it is of another run."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        other = differences(json.loads(json.dumps(run)), dict(data["run"]))
        judged = {key: float(quality) for key, quality in data["qualities"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(STAGE, str(path), "a curve", f"{type(error).__name__}: {error}", ANEW) from error
    if other:
        raise fail(STAGE, str(path), "of the same call", f"of another: {'; '.join(other)}", ANEW)
    return judged


def _check(recipe: Recipe, costs: Sequence[str], budgets: int) -> None:
    if recipe.method == "lsq":
        raise fail(STAGE, "recipe.method", "nearest, gptq or brecq", "lsq, which trains every plan", "Tune one plan.")
    if not costs or len(set(costs)) < len(costs) or not set(costs) <= set(UNITS):
        raise fail(STAGE, "costs", f"different ones of {', '.join(UNITS)}", list(costs))
    if not isinstance(budgets, int) or budgets < FEWEST:
        raise fail(STAGE, "budgets", f"at least {FEWEST}", budgets)
