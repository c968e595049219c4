"""Latency of plans: what a table of layers predicts, and what the fused network then takes.

Weights of 2, 4 and 8 bits, activations of 6 and 8, drawn for every layer alone: plans whose neighbours differ, as the
table's networks, each of one pair of widths, never have them. Then plans for budgets of latency, measured again after
they were found. Measured times are those of a network beside the widest one, in turn, in units of the table's run.
Weights are random: latency does not depend on them. Leave the machine to the command alone. Rows are kept.
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path
from statistics import median

import qk
from pages import fill
from proof.ledger import Ledger, Row
from qk import machine
from qk.bench.networks import DEFAULT, Network
from qk.errors import QkError
from qk.spec import Budget
from qk.tables import Table

ROOT = Path(__file__).parents[2]
PLANS = 24
SHARES = (0.25, 0.5, 0.75)  # of the way from the fastest plan to the slowest
WEIGHTS, ACTIVATIONS = (2, 4, 8), (6, 8)
NETWORKS = tuple(name for name in DEFAULT if "resnet50" not in name)


@cache
def searched(source: str) -> qk.Search:
    network = Network(source, 1)
    batch = network.inputs if len(network.inputs) > 1 else network.inputs[0]
    p = qk.prepare(network.model, batch, qk.Recipe(weights=8))
    return qk.Search(p, [batch], weights=WEIGHTS, activations=ACTIVATIONS, ranges="minmax")


def choices(search: qk.Search) -> list[tuple[int, ...]]:
    """Random plans, each from wider or narrower layers than the next."""
    rng, found = random.Random(0), []
    for number in range(PLANS):
        narrow = number / (PLANS - 1)
        found.append(tuple(rng.randrange(len(i.options)) if rng.random() < narrow else 0 for i in search.items))
    return found


def compare(source: str, choice: tuple[int, ...]) -> Row:
    search = searched(source)
    return {"predicted": search.costs("latency_ms").of(choice), "measured": search.measured_ms(choice)}


def meet(source: str, share: float) -> Row:
    """A plan for a budget: what it took where it was found, and when it was measured once more."""
    search = searched(source)
    costs = search.costs("latency_ms")
    fastest, slowest = (costs.rest + sum(map(end, costs.items)) for end in (min, max))
    limit = fastest + share * (slowest - fastest)
    try:
        chosen = search.plan(Budget(latency_ms=limit), "cost_only")
    except QkError:  # what widths change is less than what calls differ by
        return {"limit": limit, "found": None, "measured": None}
    return {"limit": limit, "found": chosen.measured_ms, "measured": search.measured_ms(chosen.choice)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    ledger = Ledger(ROOT / "benchmarks" / "results" / "proof-latency.json")
    here = machine.fingerprint()
    rows, budgets = [], []
    for source in options.networks:
        facts = {"network": source, "isa": here["instruction set"], "threads": here["threads"]}
        found = [
            ledger.row(facts | {"plan": number}, lambda source=source, choice=choice: compare(source, choice))
            for number, choice in enumerate(choices(searched(source)))
        ]
        apart = [abs(row["predicted"] / row["measured"] - 1) for row in found]
        times = [row["measured"] for row in found]
        name = source.rpartition(":")[2]
        cells = [f"{min(times):.2f} to {max(times):.2f}", f"{100 * median(apart):.1f}", f"{100 * max(apart):.1f}"]
        rows.append([name, len(found), *cells])
        for share in SHARES:
            row = ledger.row(facts | {"share": share}, lambda source=source, share=share: meet(source, share))
            budgets.append([name, *(f"{row[k]:.3f}" if row[k] else "refused" for k in ("limit", "found", "measured"))])
    text = f"Machine: {here['cpu']}, threads {here['threads']}, {here['instruction set']}; one sample a call.\n\n"
    head = ["network", "random plans", "measured ms", "median error of the prediction %", "largest %"]
    text += Table("", head, rows).markdown() + "\n\n"
    text += Table("", ["network", "budget (ms)", "plan, as it was found", "measured again"], budgets).markdown()
    fill(ROOT / "docs" / "results.md", f"latency {here['instruction set']}", text)
    print(text)


if __name__ == "__main__":
    main()
