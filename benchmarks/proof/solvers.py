"""What finding a plan takes: seconds of sensitivities and of the exact solver, and how near the genetic one comes.

Sensitivities are of torchvision's networks with random weights, which take as long as others, on random pictures. The
problems are those of the solvers' tests: 200 layers of four options under limits on size, latency and bit operations.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qk
from pages import fill
from proof.ledger import Ledger, Row
from qk.search.exact import exact
from qk.search.genetic import genetic
from qk.sources import import_torchvision
from qk.spec import Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from knapsacks import layers, reached  # noqa: E402 (a file of the tests)

ESTIMATED = {"eagl": ("resnet50", 224, 1), "fisher": ("resnet18", 64, 256)}  # network, pixels on a side, pictures
PROBLEMS = 5


def took(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = run()
    return found, round(time.perf_counter() - began, 3)


def sensitivity(kind: str) -> Row:
    """Seconds of the sensitivity, and of what all of them begin with: the model calibrated at all widths."""
    name, side, count = ESTIMATED[kind]
    torch.manual_seed(0)
    model = getattr(import_torchvision().models, name)(weights=None).eval()
    batches = list(torch.randn(count, 3, side, side).split(64))
    search = qk.Search(qk.prepare(model, batches[0][:1], Recipe(weights=8)), batches)
    _, bank = took(lambda: search.bank)
    _, seconds = took(lambda: search.sensitivity(kind))
    return {"all widths": bank, "sensitivity": seconds}


def problem(seed: int) -> Row:
    """Seconds of both solvers, and what the genetic one gains over the cheapest options in parts of the exact one."""
    of = layers(seed)
    best, exact_seconds = took(lambda: exact(of))
    choice, genetic_seconds = took(lambda: genetic(of, seed))
    return {"exact": exact_seconds, "genetic": genetic_seconds, "reached": reached(of, choice, best)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / "proof-solvers.json")
    rows = []
    for kind, (name, side, count) in ESTIMATED.items():
        row = ledger.row({"kind": kind, "network": name}, lambda kind=kind: sensitivity(kind))
        on = f"{count} pictures of {side} x {side}"
        rows.append([kind, name, on, f"{row['all widths']:.1f}", f"{row['sensitivity']:.1f}"])
    head = ["sensitivity", "network", "on", "seconds of calibrating all widths", "seconds beside that"]
    found = [ledger.row({"problem": seed}, lambda seed=seed: problem(seed)) for seed in range(PROBLEMS)]
    facts = ledger.rows[-1]["machine"]
    text = f"Machine: {facts['cpu']}, threads {facts['threads']}.\n\n{Table('', head, rows).markdown()}\n\n"
    seconds = [row["exact"] for row in found]
    text += f"Of {PROBLEMS} problems the exact solver took {min(seconds):.2f} to {max(seconds):.2f} s (median "
    text += f"{median(seconds):.2f}), the genetic one {median(row['genetic'] for row in found):.1f} s; it reached "
    text += f"{100 * min(row['reached'] for row in found):.2f} to {100 * max(row['reached'] for row in found):.2f} % "
    text += "of the exact one's gain.\n"
    fill(ROOT / "docs" / "results.md", "solvers", text)
    print(text)


if __name__ == "__main__":
    main()
