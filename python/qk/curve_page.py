"""The page of a curve: a plot for each cost; a point that is pointed at shows its widths and its plan."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

from qk.curve import Curve, Point
from qk.page import AFTER, BEFORE, drawing, page
from qk.search.show import UNITS

UNIFORM = "#f59e0b"
STYLE = """<style>
[id^=point-]{cursor:pointer}[id^=point-]:hover{opacity:.6}
.plan{display:none}.plan.on{display:block}
.bits{display:grid;grid-template-columns:max-content 1fr max-content;gap:0 .6rem;align-items:center;font-size:.8rem}
.bits i{background:#3b82f6;height:.55rem;border-radius:2px}
</style>"""
# A point is shown while the mouse is over it or the keyboard's focus on it, and stays until another one is.
SCRIPT = """<script>
const show=n=>document.querySelectorAll(".plan").forEach(d=>d.classList.toggle("on",d.dataset.n===n));
document.querySelectorAll("[id^=point-]").forEach(g=>{
 const n=g.id.split("-")[2];g.setAttribute("tabindex",0);
 for(const e of["mouseenter","focus","click"])g.addEventListener(e,()=>show(n))});
show("0");
</script>"""


def curve_page(curve: Curve) -> str:
    """HTML that needs no network. Without matplotlib it has the table and the plans alone."""
    plots = [
        (f"{curve.unit} against {UNITS[cost]}", lambda axes, cost=cost: _plot(axes, curve, cost))
        for cost in curve.costs
    ]
    body = [
        STYLE,
        "<p>Blue: what is best for a budget; amber: all layers at one pair of widths. Point at one for its widths.</p>",
        drawing(plots, rows=10),
        *(_plan(curve, point, number) for number, point in enumerate(curve.by_cost)),
        curve.table().html(),
        SCRIPT,
    ]
    return page(f"Pareto: {curve.title}", "".join(body))


def _plot(axes: Any, curve: Curve, cost: str) -> None:
    value = (lambda p: 100 * p.quality) if curve.judged == "accuracy" else (lambda p: p.quality)
    front = curve.front(cost)
    axes.plot(
        [p.cost(cost) for p in front], [value(p) for p in front], color=BEFORE, linewidth=1, drawstyle="steps-post"
    )
    for number, p in enumerate(curve.by_cost):
        dots = axes.scatter([p.cost(cost)], [value(p)], s=36, color=UNIFORM if p.uniform else AFTER, zorder=3)
        dots.set_gid(f"point-{cost}-{number}")
        if p.uniform:
            axes.annotate(p.name.split()[-1], (p.cost(cost), value(p)), (4, 4), textcoords="offset points", fontsize=7)
    if curve.floating is not None:
        axes.axhline(value_of_float := 100 * curve.floating, color=BEFORE, linewidth=0.8, linestyle=":")
        axes.annotate(
            "float", (1, value_of_float), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
        )
    if curve.judged == "divergence" and all(p.quality > 0 for p in curve.points):
        axes.set_yscale("log")
    axes.set_xlabel(UNITS[cost])
    axes.set_ylabel(curve.unit)
    axes.grid(color=BEFORE, alpha=0.3, linewidth=0.5)


def _plan(curve: Curve, point: Point, number: int) -> str:
    costs = [f"{point.costs[cost]:.4g} {UNITS[cost]}" for cost in curve.costs]
    if point.measured_ms is not None:
        costs.append(f"{point.measured_ms:.4g} ms measured")
    rows = []
    for name, spec in point.plan.layers.items():
        width = 100 * min(1.0, (spec.weights or 32) / 8)
        rows.append(
            f'<span>{escape(name)}</span><i style="width:{width:.0f}%"></i><span>{escape(spec.describe())}</span>'
        )
    text = base64.b64encode(json.dumps(point.plan.to_dict(), indent=1).encode()).decode()
    link = f'<a download="{escape(point.file)}" href="data:application/json;base64,{text}">its plan</a>'
    head = f"{escape(point.name)}: {curve.unit} {curve.shown(point.quality)}; {', '.join(costs)}; {link}"
    bits = f'<div class="bits">{"".join(rows)}</div>'
    return f'<figure class="plan" data-n="{number}"><figcaption>{head}</figcaption>{bits}</figure>'
