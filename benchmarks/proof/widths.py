"""Plans of mixed widths: accuracy by what estimated the losses, beside controls and one width.

On the drawn pictures, or of MiniLM, whose score is the cosine of its embeddings to the float model's. Weights have 2,
3, 4 or 8 bits, activations 8. A budget is a part of the way from all narrowest to all widest, in bit operations; one
third of it is what 4 bits everywhere cost, one sixth what 3 do. The seed draws the data that losses are estimated on,
and what is random in that. A layer is rounded once for each width, by GPTQ on what it reads in the float network, so
that it is the same in all plans that have the width. Rows are kept; a study goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import random
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot
from torch import nn

import qk
from pages import fill
from proof import networks
from proof.ledger import Ledger, Row, said
from proof.pictures import network
from proof.retrieval import Retrieval
from proof.shapes import draw
from qk.spec import Budget, Plan, Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
WEIGHTS = (2, 3, 4, 8)
BUDGETS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
METHODS = {
    "fisher, exact": ("fisher", "exact"),
    "fisher, genetic": ("fisher", "genetic"),
    "alps": ("alps", "exact"),
    "hessian": ("hessian", "exact"),
    "eagl": ("eagl", "exact"),
    "random": ("random", "exact"),
    "cost only": ("cost_only", "exact"),
}
RECIPE = Recipe(method="gptq", prefix="float")
CONTROLS = ("random", "cost only", "uniform")
SAMPLES, FIRST_SEED = 256, 1000  # of the pictures that losses are estimated on
TEXTS = 2  # batches of them, of those that calibrate


class Pictures:
    """One of proof.networks; scored by the share of test pictures that it names."""

    measured_by = "accuracy %"

    def __init__(self, name: str) -> None:
        self.network, self.calibration = network(name), networks.calibration()

    def estimates(self, seed: int) -> list[Any]:
        return list(draw(SAMPLES, FIRST_SEED + seed).images.split(64))

    def score(self, model: nn.Module) -> float:
        return networks.accuracy(model)


class Texts:
    """MiniLM on docstrings."""

    measured_by = "cosine to float, %"

    def __init__(self) -> None:
        self.task = Retrieval()
        self.network, self.calibration = self.task.model, self.task.calibration

    def estimates(self, seed: int) -> list[Any]:
        return random.Random(seed).sample(self.calibration, TEXTS)

    def score(self, model: nn.Module) -> float:
        return 1 - self.task.scores(model)["turned"]


@cache
def task(name: str) -> Pictures | Texts:
    return Texts() if name == "minilm" else Pictures(name)


@cache
def searched(name: str, seed: int) -> qk.Search:
    batches, kept = task(name).estimates(seed), ROOT / ".cache" / "proof" / f"widths-{name}-{seed}"
    return qk.Search(qk.prepare(task(name).network, batches[0]), batches, weights=WEIGHTS, folder=kept)


def limit(search: qk.Search, part: float) -> float:
    narrowest, widest = (search.uniform(bits, 8).choice for bits in (WEIGHTS[0], WEIGHTS[-1]))
    low, high = (search.costs("giga_bit_ops").of(choice) for choice in (narrowest, widest))
    return low + part * (high - low) * (1 + 1e-9)  # one width exactly meets some


def plan(name: str, method: str, part: float, seed: int) -> Plan:
    search = searched(name, seed)
    most = limit(search, part)
    if method == "uniform":
        fit = [bits for bits in WEIGHTS if search.costs("giga_bit_ops").of(search.uniform(bits, 8).choice) <= most]
        return search.uniform(max(fit), 8).plan
    sensitivity, solver = METHODS[method]
    return search.plan(Budget(giga_bit_ops=most), sensitivity, solver, seed).plan


@cache
def of_one_width(name: str, bits: int) -> nn.Module:
    """The integer model whose layers, but for those that are pinned, all have weights of so many bits."""
    given, same = task(name), searched(name, 0).uniform(bits, 8).plan
    return qk.quantize(
        given.network, given.calibration, RECIPE, plan=same, measure=False, fused=False, progress=False
    ).model


def measure(name: str, chosen: Plan) -> Row:
    model = copy.deepcopy(of_one_width(name, WEIGHTS[-1]))
    for layer, spec in chosen.layers.items():
        model.set_submodule(layer, of_one_width(name, spec.weights).get_submodule(layer))
    return {"accuracy": task(name).score(model), "widths": [spec.weights for spec in chosen.layers.values()]}


def study(ledger: Ledger, name: str, seeds: int) -> Table:
    """Accuracies, mean over seeds with the standard error of the mean."""
    facts = {"network": name, "weights": networks.fingerprint(task(name).network), "recipe": said(RECIPE)}
    rows = []
    for method in (*METHODS, "uniform"):
        cells = [method]
        for part in BUDGETS:
            found = []
            for seed in range(1 if method == "uniform" else seeds):
                chosen = plan(name, method, part, seed)
                # Plans are often the same: one is measured once.
                own = facts | {"widths": [spec.weights for spec in chosen.layers.values()]}
                found.append(100 * ledger.row(own, lambda chosen=chosen: measure(name, chosen))["accuracy"])
            spread = f" ± {stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.2f}{spread}")
        rows.append(cells)
    return Table("", [name, *(f"{part:.3f} of the way" for part in BUDGETS)], rows)


def plot(table: Table, measured_by: str, base: float, path: Path) -> None:
    """The table's curves, with their standard errors, under the float model's score."""
    matplotlib.use("svg")
    with pyplot.rc_context({"svg.hashsalt": "qk", "svg.fonttype": "none", "font.size": 9}):
        figure, axis = pyplot.subplots(figsize=(6.2, 4.2))
        axis.axhline(base, color="#333333", linewidth=1, linestyle="--", label="float")
        for method, *cells in table.rows:
            means, errors = zip(
                *([float(part) for part in (cell + " ± 0").split(" ± ")[:2]] for cell in cells), strict=True
            )
            dashes = "dotted" if method in CONTROLS else "solid"
            axis.errorbar(BUDGETS, means, errors, label=method, linestyle=dashes, marker="o", markersize=3, capsize=2)
        axis.set_xlabel("budget of bit operations, as a part of the way from 2 bits everywhere to 8")
        axis.set_ylabel(measured_by)
        axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / f"proof-widths-{options.network}.json")
    table = study(ledger, options.network, options.seeds)
    facts = ledger.rows[-1]["machine"]
    base = 100 * task(options.network).score(task(options.network).network)
    note = f"{task(options.network).measured_by}; weights rounded by gptq; seeds 0 to {options.seeds - 1} of "
    note += f"the data of the estimates; float {base:.2f}. "
    note += f"Machine: {facts['cpu']}, threads {facts['threads']}.\n\n"
    picture = f"widths-{options.network}.svg"
    plot(table, task(options.network).measured_by, base, ROOT / "docs" / picture)
    note += f"![Scores of plans by budget]({picture})\n\n"
    fill(ROOT / "docs" / "results.md", f"widths {options.network}", note + table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main()
