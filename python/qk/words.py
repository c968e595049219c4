"""What words of the command line stand for: recipes, budgets, widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qk.errors import fail
from qk.fields import parsed
from qk.spec import Budget, Recipe


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
