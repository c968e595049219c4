"""The whole curve of a network trained on the drawn pictures, and its cheapest plan that loses half a point.

qk.pareto for size and latency, and qk.cheapest for each, as a user calls them: weights of 2, 4 and 8 bits, activations
of 6 and 8, rounded by GPTQ, judged on 5,000 pictures. Both go on in the cache folder after they were stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import qk
from pages import fill
from proof import networks
from proof.pictures import network
from qk import machine
from qk.spec import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(method="gptq")
WIDTHS = {"weights": (2, 4, 8), "activations": (6, 8)}
SAMPLES, LOSE = 256, 0.005
JUDGED_ON = 5000


def accuracy(model: nn.Module) -> float:
    return networks.accuracy(model, JUDGED_ON)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg")
    options = parser.parse_args()
    name, model = options.network, network(options.network)
    folder = ROOT / ".cache" / "curves" / f"{name}-{networks.fingerprint(model)}"
    batches = networks.calibration(SAMPLES)
    common = {"evaluate": accuracy, "progress": False, "title": name, **WIDTHS}
    curve = qk.pareto(model, batches, RECIPE, out=folder / "curve", **common)
    parts = [f"Float {100 * accuracy(model):.2f} %.\n\n{curve.table().markdown()}"]
    for cost in ("size_mb", "latency_ms"):
        found = qk.cheapest(model, batches, RECIPE, cost=cost, lose=LOSE, out=folder / cost, **common)
        parts.append(f"Cheapest {cost} that loses at most {100 * LOSE} points:\n\n{found.table().markdown()}")
    here = machine.fingerprint()
    text = f"Machine: {here['cpu']}, threads {here['threads']}, {here['instruction set']}.\n\n" + "\n\n".join(parts)
    fill(ROOT / "docs" / "results.md", f"curve {name}", text)
    print(text)


if __name__ == "__main__":
    main()
