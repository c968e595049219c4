"""What a network can cost and how good it then is: points, each a plan that was quantized and judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qk.errors import fail
from qk.files import replace_file
from qk.search.show import UNITS
from qk.spec import Plan
from qk.tables import Table

STAGE = "qk.pareto"
ALL = "all "  # how the names of plans begin whose layers have one pair of widths


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
