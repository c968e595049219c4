"""Networks trained on the drawn pictures, quantized: the orderings that the papers claim, and what the default costs.

Each study names recipes that differ in one thing. A row is a network, a recipe and a seed: accuracy in float, of the
integer model, and whether that agrees with the definition of its operators. Rows are kept; a study goes on where it
was. --iterations is per unit, for all that learn, but for the studies of the default recipe, which has its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn

import qk
from pages import fill
from proof import networks
from proof.ledger import Ledger, Row, said
from qk.deploy import definition
from qk.methods import overhead
from qk.options import Tuning
from qk.spec import Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
PICTURES = 1024  # to calibrate with
NEAREST = Recipe(method="nearest")
DEFAULT = Recipe(method="brecq")
LEARNED = replace(DEFAULT, batch_size=32)  # as published
JOINT, DROPPED = replace(LEARNED, drop=1.0), replace(LEARNED, drop=0.5)
SYMMETRIC = replace(NEAREST, symmetric=True)
POINTS = {
    "plain": SYMMETRIC,
    **{
        f"points_by_{cost}": replace(SYMMETRIC, points=3, points_budget=0.1, points_cost=cost)
        for cost in ("rows", "macs")
    },
}
WINDOWS = ("5opt", "3opt", "2opt", "6opt")
TUNED = Recipe(method="lsq", tuning=Tuning(epochs=3))


def widths(weights: int, activations: int, **cases: Recipe) -> dict[str, Recipe]:
    """The cases at one width, by name."""
    made = {name: replace(recipe, weights=weights, activations=activations) for name, recipe in cases.items()}
    return {f"W{weights}A{activations} {name.replace('_', ' ')}": recipe for name, recipe in made.items()}


GRANULARITIES = {
    "nearest": NEAREST,
    **{name: replace(LEARNED, granularity=name) for name in ("layer", "block", "stage", "net")},
}


class Study(NamedTuple):
    """What is compared. pictures: to calibrate with. is_default: its iterations are those of the default recipe."""

    title: str
    cases: dict[str, Recipe]
    pictures: int = PICTURES
    is_default: bool = False


STUDIES: dict[str, Study] = {
    "default": Study(
        "The default recipe",
        {f"W{w}A{a}": replace(DEFAULT, weights=w, activations=a) for w, a in ((4, 6), (4, 4), (2, 4))},
        is_default=True,
    ),
    "inside": Study(
        "The default recipe, and dropping half inside",
        {"W4A4": replace(DEFAULT, activations=4)}
        | widths(4, 4, drops_inside=replace(DEFAULT, drop=0.5, drop_inside=True)),
        is_default=True,
    ),
    "smooth": Study(
        "Channels scaled before learning",
        {"W4A4": replace(DEFAULT, activations=4)} | widths(4, 4, smooth_three_quarters=replace(DEFAULT, smooth=0.75)),
        is_default=True,
    ),
    "scaled": Study(
        "Channels scaled, nearest rounding",
        widths(
            4,
            4,
            plain=NEAREST,
            smooth_three_quarters=replace(NEAREST, smooth=0.75),
            search=replace(NEAREST, smooth="search"),
        ),
    ),
    "granularity": Study(
        "What is reconstructed together",
        widths(3, 8, **GRANULARITIES) | widths(2, 8, **GRANULARITIES),
    ),
    "loss": Study(
        "Weights of the errors",
        widths(2, 4, **{name: replace(LEARNED, loss=name) for name in ("mse", "fisher", "fisher_full")}),
    ),
    "order": Study(
        "Order and dropping",
        widths(
            2,
            4,
            weights_first=replace(JOINT, order="weights_first"),
            joint=JOINT,
            joint_drop=DROPPED,
            joint_drop_inside=replace(DROPPED, drop_inside=True),
        ),
    ),
    "order_default": Study(
        "Order of the default recipe",
        widths(2, 4, joint=DEFAULT, weights_first=replace(DEFAULT, order="weights_first")),
        is_default=True,
    ),
    "few": Study("Dropping with 64 pictures to calibrate", widths(2, 4, joint=JOINT, joint_drop=DROPPED), 64),
    "some": Study("Dropping with 256 pictures to calibrate", widths(2, 4, joint=JOINT, joint_drop=DROPPED), 256),
    "precision": Study(
        "Precision of products while learning",
        widths(2, 4, float32=LEARNED, bfloat16=replace(LEARNED, precision="bfloat16")),
    ),
    "labels": Study(
        "Training on labels, three epochs",
        widths(4, 4, brecq=LEARNED, lsq=TUNED) | widths(3, 3, brecq=LEARNED, lsq=TUNED) | widths(2, 2, lsq=TUNED),
    ),
    "long": Study(
        "Training on labels, ten epochs",
        widths(3, 3, lsq=Recipe(method="lsq", tuning=Tuning(epochs=10))),
    ),
    "additions": Study(
        "What shortcuts take",
        widths(4, 4, float_sums=LEARNED, quantized_sums=replace(LEARNED, additions="quantized"))
        | widths(2, 4, float_sums=LEARNED, quantized_sums=replace(LEARNED, additions="quantized")),
    ),
    "windows": Study(
        "SPARQ's windows of 8-bit activations, nearest rounding",
        widths(8, 8, whole=NEAREST, **{f"sparq_{name}": replace(NEAREST, sparq=name) for name in WINDOWS})
        | widths(8, 4, plain=NEAREST)
        | widths(8, 3, plain=NEAREST),
    ),
    "points": Study(
        "Channels of several points, at most a tenth more rows, or multiply-adds",
        widths(4, 8, **POINTS) | widths(3, 8, **POINTS),
    ),
    "ranges": Study(
        "Steps without learned rounding",
        widths(4, 4, **{name: replace(NEAREST, ranges=name) for name in ("minmax", "percentile", "mse", "lapq")}),
    ),
}


@cache
def network(name: str) -> nn.Module:
    return networks.trained(networks.training(name), ROOT / ".cache" / "proof")


def measure(name: str, recipe: Recipe, pictures: int, draw: int = 0) -> Row:
    """draw: of the pictures to calibrate with."""
    train = networks.Drawn() if recipe.method == "lsq" else None
    batches = networks.calibration(pictures, draw=draw)
    result = qk.quantize(network(name), batches, recipe, train=train, measure=False, fused=False)
    seconds = result.report.seconds
    batch = networks.test_set().images[:64]
    with torch.no_grad():
        found = result.model(batch)
        with definition():
            same = torch.equal(found, result.model(batch))
    more = overhead(result.prepared)
    points = {} if more is None else {"more rows": more.extra_rows / more.rows, "more multiply-adds": more.extra_macs}
    return points | {
        "accuracy": networks.accuracy(result.model),
        "equals definition": same,
        "learning": round(seconds.get("reconstruct", 0.0) + seconds.get("tune", 0.0), 1),
    }


def table(ledger: Ledger, name: str, study: Study, seeds: int) -> Table:
    """A table of the cases for one network. What does not learn has a draw of pictures to calibrate for each seed."""
    facts = {"network": name, "weights": networks.fingerprint(network(name))}
    base = ledger.row(facts | {"case": "float"}, lambda: {"accuracy": networks.accuracy(network(name))})
    rows = [["float", f"{100 * base['accuracy']:.2f}", "", "", "", ""]]
    for case, recipe in study.cases.items():
        case += "" if study.pictures == PICTURES else f", {study.pictures} pictures"
        found = []
        for seed in range(seeds):
            seeded, draw = replace(recipe, seed=seed), seed if recipe.method == "nearest" else 0
            here = facts | {"case": case, "seed": seed, "recipe": said(seeded)} | ({"draw": draw} if draw else {})
            found.append(ledger.row(here, partial(measure, name, seeded, study.pictures, draw)))
        points = [100 * row["accuracy"] for row in found]
        spread = f"{min(points):.2f} to {max(points):.2f}" if len(points) > 1 else ""
        if "more rows" in found[0]:
            case += f" ({mean(100 * r['more rows'] for r in found):.1f} % more rows,"
            case += f" {mean(100 * r['more multiply-adds'] for r in found):.1f} % more multiply-adds)"
        same = "yes" if all(row["equals definition"] for row in found) else "NO"
        lost = f"{mean(points) - 100 * base['accuracy']:+.2f}"
        rows.append([case, f"{mean(points):.2f}", spread, lost, same, f"{mean(r['learning'] for r in found):.0f}"])
    head = [name, "accuracy %", "lowest to highest", "points from float", "equals definition", "seconds of learning"]
    return Table("", head, rows)


def section(
    ledger: Ledger,
    chosen: list[str],
    left_out: list[str],
    change: Callable[[Recipe], Recipe],
    name: str,
    seeds: int,
) -> str:
    parts = []
    for key in chosen:
        study = STUDIES[key]
        cases = {case: recipe for case, recipe in study.cases.items() if case not in left_out}
        if not study.is_default:
            cases = {case: change(recipe) for case, recipe in cases.items()}
        study = study._replace(cases=cases)
        parts.append(f"#### {study.title}\n\n{table(ledger, name, study, seeds).markdown()}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument("--without", default="", help="cases of these studies to leave out")
    parser.add_argument("--seeds", type=int, default=3, help="of learning; of draws of pictures, where nothing learns")
    parser.add_argument("--mark", default="", help="of the section to fill, where it is not the network's own")
    parser.add_argument("--iterations", type=int, default=500)
    options = parser.parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / f"proof-pictures-{options.network}.json")

    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, iterations=options.iterations) if recipe.method == "brecq" else recipe

    studies, left_out = options.studies.split(","), options.without.split(",")
    text = section(ledger, studies, left_out, change, options.network, options.seeds)
    facts = ledger.rows[-1]["machine"]
    note = f"Iterations {options.iterations}, of {LEARNED.batch_size} pictures; of the default recipe "
    note += f"{DEFAULT.iterations}, of {DEFAULT.batch_size}; {networks.TESTED_ON} test "
    note += f"pictures, {PICTURES} others to calibrate where not said; seeds 0 to {options.seeds - 1}. "
    note += f"Machine: {facts['cpu']}, threads {facts['threads']}.\n\n"
    fill(ROOT / "docs" / "results.md", f"pictures {options.network}{options.mark}", note + text)
    print(text)


if __name__ == "__main__":
    main()
