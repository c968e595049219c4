"""What commands have in common: options, what their words stand for, and how results are shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from qk.errors import fail
from qk.fields import parsed
from qk.spec import Budget, Recipe

Model = Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME, hf:PATH or python:MODULE:FUNCTION.")]
Weights = Annotated[Path | None, typer.Option(help="safetensors, or a torch file that holds tensors alone.")]
DataName = Annotated[
    str,
    typer.Option(help="digits, imagefolder:DIR (DIR?size=224&resize=256&calibration=128) or python:MODULE:FUNCTION."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML with the fields of qk.Recipe.")]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="A field of the recipe: weights=4, tuning.epochs=20, overrides.fc.weights=8."),
]
ReportFile = Annotated[Path | None, typer.Option(help="HTML (or .json) file; OUT/report.html if not given.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


def recipe_of(path: Path | None, changes: list[str]) -> Recipe:
    """The recipe of a file with fields set on top. In overrides.PATTERN.FIELD the pattern may hold dots."""
    fields = (Recipe.from_yaml(path) if path else Recipe()).to_dict()
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise fail("recipe", "--set", "FIELD=VALUE", repr(change), "For example --set weights=4.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise fail("recipe", f"--set {name}", "a YAML value", repr(text)) from error
        first, _, rest = name.partition(".")
        if first == "overrides" and rest and "." not in rest:
            raise fail(
                "recipe", "--set", "overrides.PATTERN.FIELD=VALUE", repr(change), "Name a field, such as weights."
            )
        if first == "overrides" and rest:
            pattern, _, field = rest.rpartition(".")
            fields["overrides"].setdefault(pattern, {})[field] = value
        elif rest and isinstance(fields.get(first), dict):
            fields[first][rest] = value
        else:
            fields[name] = value
    return Recipe.from_dict(fields)


def budget_of(limits: list[str]) -> Budget:
    """Of FIELD=VALUE."""
    fields: dict[str, Any] = {}
    for limit in limits:
        name, _, text = limit.partition("=")
        try:
            fields[name] = float(text)
        except ValueError:
            raise fail("search", "--budget", "FIELD=NUMBER", repr(limit), "For example --budget size_mb=4.5.") from None
    return parsed(Budget, fields, "budget")


def bits_of(option: str, text: str) -> tuple[int, ...]:
    """Of widths with commas between them; option: that has them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise fail("search", option, "widths in bits, such as 2,4,8", repr(text)) from None


def shape_of(stage: str, text: str) -> list[int]:
    """ "1,3,224,224" -> [1, 3, 224, 224]."""
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise fail(stage, "--shape", "positive numbers with commas, as 1,3,224,224", repr(text))
    return numbers


def evaluation(loaded: Any) -> Any:
    """Model -> accuracy on the data, or None where they have no labels."""
    from qk import sources

    if loaded.evaluation is None:
        return None
    return lambda model: sources.accuracy(model, loaded.evaluation)


def speaker(quiet: bool) -> Any:
    """Progress goes to stderr, so that stdout holds results alone."""
    return (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))


def show_table(table: Any) -> None:
    from qk.tables import show

    show(table, Console(file=sys.stdout))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))
