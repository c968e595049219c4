"""What the default recipe's iterations are worth: against 20,000 plain ones of BRECQ for each unit, W2A4.

Plain: the published rates of QDrop, 1e-3 for the rounding and 4e-5 for steps, without its dropping. Two networks: the
VGG on the drawn pictures, the residual network of the other studies on the digits. --orders: the tasks for which rows
are added of what QDrop compares, at the published iterations and rates: rounding before steps, and dropping. Rows are
kept; a study goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import qk
import small_digits
from pages import fill
from proof import networks
from proof.ledger import Ledger, Row, said
from qk.spec import Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
DEFAULT = Recipe(weights=2, activations=4)
RATES = {"weight_lr": 1e-3, "act_lr": 4e-5}
PLAIN = replace(DEFAULT, iterations=20_000, batch_size=32, **RATES)
CASES = {
    "20,000 plain iterations": PLAIN,
    "those of the default, at plain rates": replace(DEFAULT, **RATES),
    "the default": DEFAULT,
}
ORDERS = {
    "20,000 of rounding, then 5,000 of steps": replace(PLAIN, order="weights_first"),
    "20,000 that drop half inside": replace(PLAIN, drop=0.5, drop_inside=True),
}


@dataclass(frozen=True)
class Task:
    """What is quantized, with what, and how it is scored: a share of labels met."""

    network: Callable[[int], nn.Module]
    batches: Callable[[], list[Tensor]]
    score: Callable[[nn.Module], float]


TASKS = {
    "vgg, pictures": Task(
        lambda _: networks.trained(networks.training("vgg"), CACHE / "proof"), networks.calibration, networks.accuracy
    ),
    "residual network, digits": Task(
        lambda seed: small_digits.networks(CACHE, [seed])[0],
        lambda: small_digits.calibration(1024),
        lambda model: small_digits.accuracy(model) / 100,
    ),
}


def measure(task: Task, recipe: Recipe) -> Row:
    batches, network = task.batches(), task.network(recipe.seed)
    result = qk.quantize(network, batches, recipe, measure=False, fused=False)
    with torch.no_grad():
        apart, size = zip(*(_errors(network(x), result.model(x)) for x in batches), strict=True)
    return {
        "accuracy": task.score(result.model),
        "float": task.score(network),
        "output error": sum(apart) / sum(size),
        "learning": round(result.report.seconds["reconstruct"], 1),
    }


def _errors(expected: Tensor, found: Tensor) -> tuple[float, float]:
    return float((found - expected).square().sum()), float(expected.square().sum())


def table(ledger: Ledger, name: str, cases: dict[str, Recipe], seeds: int) -> Table:
    rows: list[list[Any]] = []
    plain, weights = None, networks.fingerprint(TASKS[name].network(0))
    for case, recipe in cases.items():
        found = [
            ledger.row(
                {"task": name, "weights": weights, "case": case, "recipe": said(replace(recipe, seed=seed))},
                lambda seed=seed, recipe=recipe: measure(TASKS[name], replace(recipe, seed=seed)),
            )
            for seed in range(seeds)
        ]
        points, lost = [100 * r["accuracy"] for r in found], [100 * (r["accuracy"] - r["float"]) for r in found]
        seconds = mean(r["learning"] for r in found)
        plain = plain or seconds
        spread = f"{min(points):.2f} to {max(points):.2f}"
        error = f"{mean(r['output error'] for r in found):.4f}"
        rows.append([case, f"{mean(points):.2f}", spread, f"{mean(lost):+.2f}", error, f"{seconds:.0f}"])
        rows[-1].append(f"{seconds / plain:.2f}")
    head = [name, "accuracy %", "lowest to highest", "points from float", "error of the output", "seconds", "of plain"]
    return Table("", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", nargs="*", default=["vgg, pictures"], choices=list(TASKS))
    options = parser.parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / "proof-speed.json")
    tables = [
        table(ledger, name, CASES | ORDERS if name in options.orders else CASES, options.seeds).markdown()
        for name in options.tasks
    ]
    facts = ledger.rows[-1]["machine"]
    note = f"The default: {DEFAULT.iterations} iterations of {DEFAULT.batch_size} samples, plain ones of "
    note += f"{PLAIN.batch_size}; weight_lr {DEFAULT.weight_lr}, act_lr {DEFAULT.act_lr}; "
    note += f"seeds 0 to {options.seeds - 1}. Machine: {facts['cpu']}, threads {facts['threads']}.\n\n"
    fill(ROOT / "docs" / "results.md", "speed", note + "\n\n".join(tables))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
