"""qk search: the width of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qk.errors import fail
from qk.files import check_writable
from qk.words import (
    BatchSize,
    Change,
    DataName,
    Json,
    Model,
    RecipeFile,
    Weights,
    bits_of,
    budget_of,
    evaluation,
    print_json,
    recipe_of,
    show_table,
    speaker,
)


def search(
    model: Model,
    data: DataName,
    out: Annotated[
        Path, typer.Option(help="JSON file for the plan, which qk quantize --plan takes; a folder with --pareto.")
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="What the network may cost: size_mb=4.5, latency_ms=2, giga_bit_ops=30, size_share=0.6, "
            "latency_share=0.8 or bit_ops_share=0.5; several hold at once."
        ),
    ] = None,
    pareto: Annotated[
        int | None,
        typer.Option(
            "--pareto",
            min=2,
            help="Plans for so many budgets of size and of latency, each quantized as the recipe says and judged; "
            "a page with the curve, and a run that was killed goes on.",
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="Of size_mb, latency_ms and giga_bit_ops: one for --lose (latency_ms), several for --pareto "
            "(size_mb,latency_ms)."
        ),
    ] = None,
    lose: Annotated[
        float | None,
        typer.Option(
            "--lose",
            min=0,
            help="Points of accuracy that the network may lose: the cheapest plan by one --cost, of plans that are "
            "quantized as the recipe says and judged.",
        ),
    ] = None,
    weights: Weights = None,
    recipe: RecipeFile = None,
    change: Change = None,
    widths: Annotated[str, typer.Option(help="Of weights to choose from.")] = "2,4,8",
    activations: Annotated[str, typer.Option(help="Widths of activations to choose from.")] = "8",
    tied: Annotated[
        bool, typer.Option("--tied", help="The first of one with the first of the other, and so on.")
    ] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers that stay as the recipe has them; else the first and the last.")
    ] = None,
    sensitivity: Annotated[
        str,
        typer.Option(
            help="fisher, alps, alps_learned, alps_trained (data with labels to train on), hessian, eagl; random or "
            "cost_only as controls."
        ),
    ] = "fisher",
    solver: Annotated[str, typer.Option(help="exact or genetic.")] = "exact",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    table: Annotated[
        Path | None, typer.Option(help="Latencies: read where it is there, and written with what was measured.")
    ] = None,
    foreign: Annotated[
        bool, typer.Option("--foreign", help="The table is of another machine (qk bench table), for which to choose.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Sensitivities are kept there: a run that was killed goes on, another budget finds them."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="With --folder: how many share the estimate, and the threads.")
    ] = 1,
    assists: Annotated[bool, typer.Option("--assists", hidden=True)] = False,
    batch_size: BatchSize = 32,
    as_json: Json = False,
) -> None:
    """Chooses the width of every layer for a size, a latency on this machine, or bit operations."""
    from qk import sources
    from qk.prepare import prepare
    from qk.search import LatencyTable, Search
    from qk.search.choose import check_solver
    from qk.search.sharing import sharing
    from qk.search.show import chosen_tables

    given = [name for name, x in (("--budget", budget), ("--pareto", pareto), ("--lose", lose)) if x not in (None, [])]
    if len(given) != 1:
        raise fail("search", "it", "one of --budget, --pareto and --lose", " and ".join(given) or "none")
    if processes > 1 and (folder is None or not budget):
        raise fail("search", "--processes", "beside --folder and --budget", processes)
    limits = budget_of(budget) if budget else None
    wanted = recipe_of(recipe, change or [])
    options = {"weights": bits_of("--widths", widths), "activations": bits_of("--activations", activations)}
    options |= {"tied": tied, "keep": keep or None, "folder": folder}
    if foreign and (table is None or not table.exists()):
        raise fail("search", "--foreign", "beside --table with a file of qk bench table", table or "none")
    known = None  # a curve keeps its own, and a helper needs none
    if not assists and (budget or table is not None):
        known = LatencyTable.load(table, foreign) if table is not None and table.exists() else LatencyTable()
    for path in (out if budget else None, table):
        if path is not None:
            check_writable(path, "search")
    floating = sources.load_model(model, weights)
    loaded = sources.load_data(data, batch_size)
    speaker(as_json)(f"searching widths of {model} on {data}")
    batches = list(loaded.calibration)
    if sensitivity == "alps_trained":
        options["train"] = loaded.train
    if not budget:
        how = {"evaluate": evaluation(loaded), "sensitivity": sensitivity, "solver": solver, "seed": seed}
        how |= {"table": known, "out": out, "progress": not as_json, "title": f"{model} on {data}"} | options
        found, tables = _curve(floating, batches, wanted, cost, pareto, lose, how)
        if table is not None and not foreign:
            known.save(table)
        if as_json:
            print_json(found)
            return
        for shown in tables:
            show_table(shown)
            typer.echo()
        typer.echo(f"plans and the page: {out}")
        return
    check_solver(solver)
    search = Search(prepare(floating, batches[0], wanted), batches, table=known, **options)
    if assists:
        search.sensitivity(sensitivity, seed)
        return
    if processes > 1:
        for name in limits.limits():  # with all threads, and before the long part
            search.costs(name)
        with sharing(processes):  # into the folder, where the plan finds it
            Search(search.p, batches, **options).sensitivity(sensitivity, seed)
    chosen = search.plan(limits, sensitivity, solver, seed)
    path = chosen.plan.save(out)
    if table is not None and not foreign:
        search.table.save(table)
    if as_json:
        facts = {"plan": str(path), "costs": chosen.costs, "loss": chosen.loss, "measured_ms": chosen.measured_ms}
        print_json(facts | {"layers": {name: spec.describe() for name, spec in chosen.plan.layers.items()}})
        return
    for shown in chosen_tables(search, chosen):
        show_table(shown)
        typer.echo()
    typer.echo(f"plan: {path}")


def _curve(
    model: Any, batches: list, recipe: Any, cost: str | None, pareto: int | None, lose: float | None, how: dict
) -> tuple[dict[str, Any], list[Any]]:
    """What --pareto or --lose found, as JSON and as tables."""
    from qk.cheapest import cheapest
    from qk.pareto import pareto as curve_of

    if pareto:
        costs = (cost or "size_mb,latency_ms").split(",")
        curve = curve_of(model, batches, recipe, costs=costs, budgets=pareto, **how)
        return curve.to_dict(), [curve.table()]
    if how["evaluate"] is None:
        raise fail("search", "--data", "labelled with --lose, which judges by accuracy", "data without labels")
    found = cheapest(model, batches, recipe, lose=lose / 100, cost=cost or "latency_ms", **how)
    facts = {"chosen": found.point.name, "why": found.reasons}
    return found.tried.to_dict() | facts, [found.table(), found.tried.table()]
