"""Plans of mixed widths on the drawn pictures: accuracy by what estimated the losses, beside controls and one width.

Weights have 2, 3, 4 or 8 bits, activations 8. A budget is a part of the way from all narrowest to all widest, in bit
operations; one third of it is what 4 bits everywhere cost, one sixth what 3 do. The seed draws the pictures that losses
are estimated on, and what is random in that. All plans are rounded and calibrated alike, on the same pictures. Rows are
kept; a study goes on where it was.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import qk
from pages import fill
from proof import networks
from proof.ledger import Ledger, Row, said
from proof.pictures import network
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
SAMPLES, FIRST_SEED = 256, 1000  # of the pictures that losses are estimated on


@cache
def searched(name: str, seed: int) -> qk.Search:
    batches = list(draw(SAMPLES, FIRST_SEED + seed).images.split(64))
    return qk.Search(qk.prepare(network(name), batches[0]), batches, weights=WEIGHTS)


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


def measure(name: str, chosen: Plan, recipe: Recipe) -> Row:
    images = networks.calibration()
    result = qk.quantize(network(name), images, recipe, plan=chosen, measure=False, fused=False, progress=False)
    widths = [spec.weights for spec in chosen.layers.values()]
    return {"accuracy": networks.accuracy(result.model), "widths": widths}


def study(ledger: Ledger, name: str, recipe: Recipe, seeds: int) -> Table:
    """Accuracies, mean over seeds with the standard error of the mean."""
    facts = {"network": name, "weights": networks.fingerprint(network(name)), "recipe": said(recipe)}
    rows = []
    for method in (*METHODS, "uniform"):
        cells = [method]
        for part in BUDGETS:
            found = []
            for seed in range(1 if method == "uniform" else seeds):
                chosen = plan(name, method, part, seed)
                # Plans are often the same: one is measured once.
                own = facts | {"widths": [spec.weights for spec in chosen.layers.values()]}
                found.append(100 * ledger.row(own, lambda chosen=chosen: measure(name, chosen, recipe))["accuracy"])
            spread = f" ± {stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.2f}{spread}")
        rows.append(cells)
    return Table("", [name, *(f"{part:.3f} of the way" for part in BUDGETS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg")
    parser.add_argument("--method", default="gptq", help="how weights are rounded: nearest, gptq or brecq")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / f"proof-widths-{options.network}.json")
    table = study(ledger, options.network, Recipe(method=options.method), options.seeds)
    facts = ledger.rows[-1]["machine"]
    base = 100 * networks.accuracy(network(options.network))
    note = (
        f"Weights rounded by {options.method}; {networks.TESTED_ON} test pictures, {SAMPLES} others for each seed of "
    )
    note += f"the estimates, seeds 0 to {options.seeds - 1}; float {base:.2f} %. "
    note += f"Machine: {facts['cpu']}, threads {facts['threads']}.\n\n"
    fill(ROOT / "docs" / "results.md", f"widths {options.network}", note + table.markdown())
    print(table.markdown())


if __name__ == "__main__":
    main()
