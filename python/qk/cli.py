"""qk on the command line: demo, quantize, search, hago, tune, eval, inspect, doctor, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qk.bench.command import bench
from qk.errors import QkError, fail
from qk.hago_command import hago
from qk.search_command import search
from qk.words import (
    BatchSize,
    Change,
    DataName,
    Json,
    Model,
    RecipeFile,
    ReportFile,
    Weights,
    evaluation,
    print_json,
    recipe_of,
    show_table,
    speaker,
)


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

    study = run(out, cache=cache, seed=seed, iterations=iterations, say=speaker(as_json))
    if as_json:
        print_json(study.to_dict())
        return
    show_table(study.table())
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


app.command()(search)
app.command()(hago)


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
    validate: Annotated[
        str | None,
        typer.Option(help="Data whose labels choose the epoch that is kept; other than those that judge the result."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Trains a model for its widths on labelled data (LSQ), saves it, and reports what that changed."""
    changes = change or []
    if other := [item for item in changes if item.startswith("method=") and item != "method=lsq"]:
        raise fail("tune", "--set method", "lsq, or left out", other[0].removeprefix("method="), "See qk quantize.")
    wanted = recipe_of(recipe, [*changes, "method=lsq"])
    _quantize(model, data, out, weights, wanted, report, batch_size, as_json, validate=validate)


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
    validate: str | None = None,
) -> None:
    """The model quantized as the recipe says, its checkpoint and report; what both commands above do."""
    import qk
    from qk import sources
    from qk.files import check_writable

    widths = None if plan is None else qk.Plan.load(plan)
    report = report or out / "report.html"
    check_writable(report, "quantize")
    say = speaker(as_json)
    floating = sources.load_model(model, weights)
    loaded = sources.load_data(data, batch_size)
    evaluate = evaluation(loaded)
    train = None
    if recipe.method == "lsq":
        train = loaded.train
        if train is None:
            raise fail("tune", data, "data with labels to train on", "calibration and evaluation data alone")
    score = None if validate is None else evaluation(sources.load_data(validate, batch_size))
    if validate is not None and score is None:
        raise fail("tune", "--validate", "data with labels", validate)
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
        validate=score,
        evaluate=evaluate,
        out=out,
        title=f"{model} on {data}",
        progress=not as_json,
    )
    path = result.report.save(report)
    if as_json:
        print_json({"checkpoint": str(out), "report": str(path), **result.report.to_dict()})
        return
    for table in result.report.tables():
        show_table(table)
        typer.echo()
    typer.echo(f"checkpoint: {out}\nreport: {path}")


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
        print_json({"model": model, "checkpoint": checkpoint and str(checkpoint), "data": data, "accuracy": share})
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
        print_json(facts)
        return
    for table in shown:
        show_table(table)
        typer.echo()


@app.command()
def doctor(as_json: Json = False) -> None:
    """What is installed and built, what this machine can run, and whether the kernels meet their definitions."""
    from qk import doctor as checks

    facts, shown, healthy = checks.examine()
    if as_json:
        print_json(facts)
    else:
        for table in shown:
            show_table(table)
            typer.echo()
        typer.echo("all checks passed" if healthy else "a check failed")
    if not healthy:
        raise typer.Exit(1)


def main() -> None:
    """The command `qk`."""
    app(prog_name="qk")


if __name__ == "__main__":
    main()
