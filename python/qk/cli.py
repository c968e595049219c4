"""qk on the command line: demo, quantize, search, tune, eval, inspect, doctor, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from qk.bench.command import bench
from qk.errors import QkError, fail
from qk.words import bits_of, budget_of, recipe_of


class _Group(TyperGroup):
    """An error of a stage or an operator is one plain line and exit code 1; --debug shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (QkError, RuntimeError) as error:
            if ctx.params.get("debug") or not (isinstance(error, QkError) or str(error).startswith("qk::")):
                raise
            line = " ".join(str(error).split())
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME, hf:PATH or python:MODULE:FUNCTION.")]
Weights = Annotated[Path | None, typer.Option(help="safetensors, or a torch file that holds tensors alone.")]
DataName = Annotated[str, typer.Option(help="digits, imagefolder:DIR or python:MODULE:FUNCTION.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML with the fields of qk.Recipe.")]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the recipe: weights=4, tuning.epochs=20, overrides.fc.weights=8."),
]
ReportFile = Annotated[Path | None, typer.Option(help="HTML (or .json) file; OUT/report.html if not given.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from qk import machine

        typer.echo(machine.qk_version())
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def demo(
    cache: Annotated[Path | None, typer.Option(help="Folder for the trained network (~/.cache/qk).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the report.")] = Path("qk-demo"),
    seed: Annotated[int, typer.Option(help="Of the network and of the learning.")] = 0,
    iterations: Annotated[int | None, typer.Option(min=1, help="Of learning, for each unit.")] = None,
    as_json: Json = False,
) -> None:
    """Trains a small residual network on handwritten digits, quantizes it in ten ways and measures each."""
    from qk.demo.study import run

    study = run(out, cache=cache, seed=seed, iterations=iterations, say=_say(as_json))
    if as_json:
        _print_json(study.to_dict())
        return
    _show(study.table())
    typer.echo(f"\n{study.verdict()}\nreport: {study.report_path}")


@app.command()
def quantize(
    model: Model,
    data: DataName,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    change: Change = None,
    plan: Annotated[Path | None, typer.Option(help="Widths of all layers, a file of qk search.")] = None,
    report: ReportFile = None,
    batch_size: BatchSize = 32,
    labels: Annotated[
        bool, typer.Option("--labels", help="Ranges lapq by the data's labels, not the model's own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantizes a model, saves it, and reports what that changed."""
    _quantize(model, data, out, weights, recipe_of(recipe, change or []), report, batch_size, as_json, labels, plan)


@app.command()
def tune(
    model: Model,
    data: DataName,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; a run that was killed goes on from there.")],
    weights: Weights = None,
    recipe: RecipeFile = None,
    change: Change = None,
    report: ReportFile = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Trains a model for its widths on labelled data (LSQ), saves it, and reports what that changed."""
    wanted = recipe_of(recipe, [*(change or []), "method=lsq"])
    _quantize(model, data, out, weights, wanted, report, batch_size, as_json)


def _quantize(
    model: str,
    data: str,
    out: Path,
    weights: Path | None,
    recipe: Any,
    report: Path | None,
    batch_size: int,
    as_json: bool,
    by_labels: bool = False,
    plan: Path | None = None,
) -> None:
    """The model quantized as the recipe says, its checkpoint and report; what both commands above do."""
    import qk
    from qk import sources
    from qk.files import writable_folder

    widths = None if plan is None else qk.Plan.load(plan)
    report = report or out / "report.html"
    writable_folder(report.parent, "quantize")
    say = _say(as_json)
    floating = sources.load_model(model, weights)
    loaded = sources.load_data(data, batch_size)
    evaluate = _evaluation(loaded)
    train = None
    if recipe.method == "lsq":
        train = loaded.train
        if train is None:
            raise fail("tune", data, "data with labels to train on", "calibration and evaluation data alone")
    if by_labels and loaded.labels is None:
        raise fail("quantize", "--labels", "left out with data whose calibration batches have none", data)
    say(f"{'tuning' if train else 'quantizing'} {model} on {data}")
    result = qk.quantize(
        floating,
        loaded.calibration,
        recipe,
        plan=widths,
        labels=loaded.labels if by_labels else None,
        train=train,
        evaluate=evaluate,
        out=out,
        title=f"{model} on {data}",
        progress=not as_json,
    )
    path = result.report.save(report)
    if as_json:
        _print_json({"checkpoint": str(out), "report": str(path), **result.report.to_dict()})
        return
    for table in result.report.tables():
        _show(table)
        typer.echo()
    typer.echo(f"checkpoint: {out}\nreport: {path}")


@app.command()
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
        str, typer.Option(help="Of --pareto: of size_mb, latency_ms, giga_bit_ops.")
    ] = "size_mb,latency_ms",
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
        str, typer.Option(help="fisher, alps, hessian, eagl; random or cost_only as controls.")
    ] = "fisher",
    solver: Annotated[str, typer.Option(help="exact or genetic.")] = "exact",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    table: Annotated[
        Path | None, typer.Option(help="Latencies: read where it is there, and written with what was measured.")
    ] = None,
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
    import qk
    from qk import sources
    from qk.search.sharing import sharing
    from qk.search.show import chosen_tables

    if bool(budget) == (pareto is not None):
        raise fail("search", "--budget", "limits, or --pareto in their place", "both" if budget else "neither")
    if processes > 1 and (folder is None or pareto):
        raise fail("search", "--processes", "--folder beside it, and no --pareto", processes)
    limits = None if pareto else budget_of(budget)
    wanted = recipe_of(recipe, change or [])
    options = {"weights": bits_of("--widths", widths), "activations": bits_of("--activations", activations)}
    options |= {"tied": tied, "keep": keep or None, "folder": folder}
    known = None if table is None else qk.LatencyTable.load(table) if table.exists() else qk.LatencyTable()
    floating = sources.load_model(model, weights)
    loaded = sources.load_data(data, batch_size)
    _say(as_json)(f"searching widths of {model} on {data}")
    batches = list(loaded.calibration)
    if pareto:
        evaluate = _evaluation(loaded)
        how = {"costs": cost.split(","), "budgets": pareto, "sensitivity": sensitivity, "solver": solver, "seed": seed}
        how |= {"table": known, "out": out, "progress": not as_json, "title": f"{model} on {data}"}
        curve = qk.pareto(floating, batches, wanted, evaluate=evaluate, **how, **options)
        if known is not None:
            known.save(table)
        if as_json:
            _print_json(curve.to_dict())
            return
        _show(curve.table())
        typer.echo(f"\nplans and the page: {out}")
        return
    with sharing(1 if assists else processes):
        search = qk.Search(qk.prepare(floating, batches[0], wanted), batches, table=known, **options)
        search.sensitivity(sensitivity, seed)
    if assists:
        return
    chosen = search.plan(limits, sensitivity, solver, seed)
    path = chosen.plan.save(out)
    if table is not None:
        search.table.save(table)
    if as_json:
        facts = {"plan": str(path), "costs": chosen.costs, "loss": chosen.loss, "measured_ms": chosen.measured_ms}
        _print_json(facts | {"layers": {name: spec.describe() for name, spec in chosen.plan.layers.items()}})
        return
    for shown in chosen_tables(search, chosen):
        _show(shown)
        typer.echo()
    typer.echo(f"plan: {path}")


@app.command("eval")
def evaluate(
    model: Model,
    data: DataName,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of qk quantize; without it the float model.")] = None,
    weights: Weights = None,
    batch_size: BatchSize = 32,
    as_json: Json = False,
) -> None:
    """Accuracy of a model, or of a checkpoint made from it, on labelled data."""
    import qk
    from qk import sources

    loaded = sources.load_data(data, batch_size)
    if loaded.evaluation is None:
        raise fail("eval", data, "data with labels", "calibration data alone")
    measured = sources.load_model(model, weights)
    if checkpoint is not None:
        measured = qk.load(checkpoint, model=measured)
    share = sources.accuracy(measured, loaded.evaluation)
    if as_json:
        _print_json({"model": model, "checkpoint": checkpoint and str(checkpoint), "data": data, "accuracy": share})
    else:
        typer.echo(f"accuracy: {100 * share:.2f} %")


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A checkpoint's folder, or a model as for --model.")],
    data: Annotated[str | None, typer.Option(help="A model needs an example: from this data,")] = None,
    shape: Annotated[str | None, typer.Option(help="or noise of this shape: 1,3,224,224.")] = None,
    weights: Weights = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with the fields of qk.Recipe.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A field of the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint holds, or what qk finds in a model: layers, widths, blocks, links, folds."""
    from qk import inspection

    if Path(target).is_dir():
        facts, shown = inspection.of_checkpoint(Path(target))
    elif ":" not in target:
        expected = "a checkpoint's folder, or a model such as torchvision:resnet18"
        raise fail("inspect", "the target", expected, repr(target))
    else:
        facts, shown = inspection.of_model(target, weights, data, shape, recipe_of(recipe, change or []))
    if as_json:
        _print_json(facts)
        return
    for table in shown:
        _show(table)
        typer.echo()


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed and built, what this machine can run, and whether the kernels meet their definitions."""
    from qk import doctor as checks

    facts, shown, healthy = checks.examine()
    if as_json:
        _print_json(facts)
    else:
        for table in shown:
            _show(table)
            typer.echo()
        typer.echo("all checks passed" if healthy else "a check failed")
    if not healthy:
        raise typer.Exit(1)


def _evaluation(loaded: Any) -> Any:
    """Model -> accuracy on the data, or None where they have no labels."""
    from qk import sources

    if loaded.evaluation is None:
        return None
    return lambda model: sources.accuracy(model, loaded.evaluation)


def _say(quiet: bool) -> Any:
    """Progress goes to stderr, so that stdout holds results alone."""
    return (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))


def _show(table: Any) -> None:
    from qk.tables import show

    show(table, Console(file=sys.stdout))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


def main() -> None:
    """The command `qk`."""
    app(prog_name="qk")


if __name__ == "__main__":
    main()
