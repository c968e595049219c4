"""Rows of a study on disk: written one by one, so that a study that was interrupted goes on with what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qk import machine
from qk.files import replace_file
from qk.spec import Recipe

Row = dict[str, Any]
# Of a recipe that learns by reconstruction, in every row, as their defaults may change.
LEARNING = ("iterations", "batch_size", "weight_lr", "act_lr", "drop")


def said(recipe: Recipe) -> Row:
    """A recipe as a row's fact: what differs from the defaults, the seed, and LEARNING. A field that is new changes no
    old row."""
    plain, always = Recipe().to_dict(), ("seed", *(LEARNING if recipe.method == "brecq" else ()))
    return {name: x for name, x in recipe.to_dict().items() if name in always or x != plain[name]}


class Ledger:
    """A JSON file of rows. A row has the facts that it was measured for, what was found, seconds and the machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def row(self, facts: Row, measure: Callable[[], Row]) -> Row:
        """What was measured for these facts, now or earlier."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in facts.items()):
                return row
        began = time.perf_counter()
        found = facts | measure()
        found |= {"seconds": round(time.perf_counter() - began, 1), "machine": machine.fingerprint()}
        self.rows.append(found)
        replace_file(self.path, json.dumps(self.rows, indent=1).encode())
        print(", ".join(f"{key} {value}" for key, value in found.items() if key != "machine"), flush=True)
        return found
