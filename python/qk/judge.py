"""Plans of one model, each quantized as a recipe says, judged and timed; what was judged is kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qk.calibrate.batches import hold
from qk.calibrate.objective import first_tensor, task_loss
from qk.curve import Curve, Point
from qk.errors import fail
from qk.files import writable_folder, write_json
from qk.flow import quantize, share_met
from qk.inputs import digest, evaluating, feed
from qk.machine import qk_version
from qk.methods.resume import ANEW, batches_digest, differences
from qk.prepare import prepare
from qk.search.choose import Chosen, Kind, Search, Solver, check_solver
from qk.search.latency import LatencyTable
from qk.search.show import UNITS
from qk.spec import Recipe, checked_recipe

FILE, PAGE, LATENCIES, PLANS, KEPT = "curve.json", "curve.html", "latencies.json", "plans", "sensitivities"
OPEN = ("folder", "train")  # options that may be others when a run goes on
ROUNDING = 1e-9  # by which sums in another order may differ
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class How:
    """By what plans are chosen. table: of latencies; options: Search's others."""

    sensitivity: Kind = "fisher"
    solver: Solver = "exact"
    seed: int = 0
    table: LatencyTable | str | Path | None = None
    options: dict[str, Any] | None = None


class Judge:
    """Gathers points in `curve`. more: what else a run in the folder must agree in.

    Raises QkError as Search does, and for a folder of another run.
    """

    def __init__(
        self,
        stage: str,
        model: nn.Module,
        batches: Iterable,
        recipe: Recipe | None,
        costs: Sequence[str],
        how: How,
        evaluate: Evaluate | None,
        out: str | Path | None,
        title: str,
        more: dict[str, Any],
    ) -> None:
        self.stage, self.model, self.recipe, self.evaluate = stage, model, checked_recipe(recipe, stage), evaluate
        _check(stage, self.recipe, costs)
        check_solver(how.solver)
        self.batches = hold(batches, stage, None, self.recipe.memory_mb)
        options = dict(how.options or {})
        self.folder = None if out is None else writable_folder(out, stage)
        known, table = repr(sorted((name, x) for name, x in options.items() if name not in OPEN)), how.table
        self.run = {
            "qk": qk_version(),
            "torch": torch.__version__,
            "recipe": self.recipe.to_dict(),
            "options": f"{known}, {how.sensitivity}, {how.solver}, {how.seed}, {tuple(costs)}, {evaluate is None}",
            "model": digest(sorted(model.state_dict().items())),
            "batches": batches_digest(self.batches),
        } | more
        self.judged = {}
        if self.folder is not None:
            self.judged = self._judged(self.folder / FILE)
            options["folder"] = options.get("folder") or self.folder / KEPT
            if table is None and (self.folder / LATENCIES).exists():
                table = self.folder / LATENCIES
        ranges = "mse" if self.recipe.ranges == "lapq" else self.recipe.ranges  # lapq depends on the whole plan
        prepared = prepare(model, self.batches[0], self.recipe)
        self.search = Search(prepared, self.batches, ranges=ranges, table=table, **options)
        self.how = how
        for cost in costs:  # now, so that every choice is given all of them
            self.search.costs(cost)
        if self.folder is not None and "latency_ms" in costs:
            self.search.table.save(self.folder / LATENCIES)
        floating, kind = None, "divergence"
        if evaluate is not None:
            kind = "accuracy"
            with evaluating(model):
                floating = share_met(evaluate, model, stage)
        self.losses = self.search.sensitivity(how.sensitivity, how.seed)
        self.curve = Curve(title or type(model).__name__, kind, tuple(costs), [], floating)

    def plans(self, cost: str, count: int) -> dict[str, Chosen]:
        """Name -> the plan that is expected to lose least, for so many budgets from what the network costs at its
        cheapest to what it costs at its dearest; of equal ones the first."""
        of = self.search.costs(cost)
        least, most = of.rest + sum(map(min, of.items)), of.rest + sum(map(max, of.items))
        found: dict[tuple[int, ...], tuple[str, Chosen]] = {}
        for k in range(count):
            limit = (least + (most - least) * k / (count - 1)) * (1 + ROUNDING)
            one = self.search.solve({cost: limit}, self.losses, self.how.solver, self.how.seed)
            found.setdefault(one.choice, (f"{cost} {limit:.4g}", one))
        return dict(found.values())

    def add(self, name: str, one: Chosen) -> Point:
        """Quantizes and judges a plan, or remembers it, and times it where latency is asked for."""
        key, search, curve = json.dumps(one.plan.to_dict()), self.search, self.curve
        if key not in self.judged:
            result = quantize(self.model, self.batches, self.recipe, plan=one.plan, measure=False, progress=False)
            self.judged[key] = self._quality(result.fused or result.model)
        timed = "latency_ms" in curve.costs and not search.table.is_foreign
        measured = search.measured_ms(one.choice) if timed else None
        point = Point(name, one.plan, one.costs, one.loss, self.judged[key], measured)
        curve.points.append(point)
        if self.folder is not None:
            one.plan.save(self.folder / PLANS / point.file)
            write_json(self.folder / FILE, {"run": self.run, "qualities": self.judged} | curve.to_dict(), self.stage)
        return point

    def finish(self) -> Curve:
        """The curve, with its page in the folder."""
        if self.folder is not None:
            self.curve.save(self.folder / PAGE)
        return self.curve

    def _quality(self, found: nn.Module) -> float:
        if self.evaluate is None:
            return divergence(self.model, found, self.batches)
        with evaluating(found):
            return share_met(self.evaluate, found, self.stage)

    def _judged(self, path: Path) -> dict[str, float]:
        """What a run that was begun there found: quality by plan. Raises QkError where it is another."""
        if not path.exists():
            return {}
        try:
            data = json.loads(path.read_text())
            other = differences(json.loads(json.dumps(self.run)), dict(data["run"]))
            judged = {key: float(quality) for key, quality in data["qualities"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise fail(self.stage, str(path), "a curve", f"{type(error).__name__}: {error}", ANEW) from error
        if other:
            raise fail(self.stage, str(path), "of the same call", f"of another: {'; '.join(other)}", ANEW)
        return judged


def divergence(model: nn.Module, found: nn.Module, batches: list) -> float:
    """Of found's output from model's, for a sample of the batches: see qk.calibrate.objective.task_loss."""
    total, samples = 0.0, 0
    with evaluating(model), evaluating(found), torch.no_grad():
        for batch in batches:
            expected, got = first_tensor(feed(model, batch)), first_tensor(feed(found, batch))
            total += float(task_loss(got, expected, batch))
            samples += len(expected)
    return total / samples


def _check(stage: str, recipe: Recipe, costs: Sequence[str]) -> None:
    if recipe.method == "lsq":
        raise fail(stage, "recipe.method", "nearest, gptq or brecq", "lsq, which trains every plan", "Tune one plan.")
    if not costs or len(set(costs)) < len(costs) or not set(costs) <= set(UNITS):
        raise fail(stage, "costs", f"different ones of {', '.join(UNITS)}", list(costs))
