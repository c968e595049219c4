"""The curve of what a network can cost and how good it then is: plans for many budgets, each quantized and judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qk.curve import ALL, STAGE, Curve
from qk.errors import fail
from qk.judge import Evaluate, How, Judge
from qk.progress import Progress
from qk.search.choose import Chosen, Kind, Solver
from qk.search.latency import LatencyTable
from qk.spec import Recipe

FEWEST = 2  # budgets of a curve


def pareto(
    model: nn.Module,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    costs: Sequence[str] = ("size_mb", "latency_ms"),
    budgets: int = 8,
    evaluate: Evaluate | None = None,
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
    out: a folder for curve.json, curve.html, a plan for each point, which qk quantize --plan takes, the latencies and
    the sensitivities. The same call goes on there after it was killed; another call is refused.
    Raises QkError as Search and qk.quantize do.
    """
    if not isinstance(budgets, int) or budgets < FEWEST:
        raise fail(STAGE, "budgets", f"at least {FEWEST}", budgets)
    how = How(sensitivity, solver, seed, table, options)
    judge = Judge(STAGE, model, batches, recipe, costs, how, evaluate, out, title, {"budgets": budgets})
    chosen = _chosen(judge, costs, budgets)
    with Progress("auto" if progress else "off", STAGE, len(chosen), len(chosen)) as shown:
        for name, one in chosen.items():
            shown.unit(name)
            shown.finish(1, f"{judge.curve.judged} {judge.add(name, one).quality:.4g}")
    return judge.finish()


def _chosen(judge: Judge, costs: Sequence[str], budgets: int) -> dict[str, Chosen]:
    """Name -> plan: all layers at each pair of widths, then what is best for each budget where that is another."""
    search = judge.search
    found: dict[tuple[int, ...], tuple[str, Chosen]] = {}
    for w, a in sorted({option for item in search.items for option in item.options}, reverse=True):
        choice = search.uniform(w, a).choice
        found.setdefault(choice, (f"{ALL}W{w}A{a}", search.chosen(choice, judge.losses.of(choice))))
    for cost in costs:
        for name, one in judge.plans(cost, budgets).items():
            found.setdefault(one.choice, (name, one))
    return dict(found.values())
