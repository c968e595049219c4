"""Multipoint against one point, and channels chosen by error against random ones: tables of docs/methods/multipoint.md.

    python benchmarks/multipoint_digits.py [--pictures vgg] [--cache .cache]

Nearest rounding, activations of 8 bits, first and last layer of 8 bits. "error" is the mean squared difference to the
float network's logits, as a part of their mean square: it still tells networks apart where accuracy is saturated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

import qk
import small_digits
from qk.calibrate.moments import second_moments
from qk.methods import overhead
from qk.methods.multipoint import candidates, costs_of, multipoint, place
from qk.prepare import Prepared
from qk.tables import Table

SEEDS = 4
WIDTHS = (4, 3, 2)
BUDGET = 0.1


def at_random(p: Prepared, batches: list[Tensor], budget: float, cost: str, seed: int) -> None:
    """As multipoint, with second points for channels that are drawn."""
    layers = {name: layer for name, layer in p.quant_layers().items() if layer.spec.points > 1}
    costs = dict(zip(layers, costs_of(p, list(layers), cost), strict=True))
    counts = {name: torch.ones(len(layer.weight), dtype=torch.int64) for name, layer in layers.items()}
    rows = [(name, c) for name, count in counts.items() for c in range(len(count))]
    for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        name, channel = rows[i]
        if costs[name] <= budget:
            counts[name][channel] += 1
            budget -= costs[name]
    for name, moments in second_moments(p, list(layers), batches, "random", 1024):
        layer = layers[name]
        place(layer, candidates(layer.weight_rows(), layer.spec.weights, 3, moments), counts[name])


def nothing(p: Prepared, batches: list[Tensor]) -> None:
    """Ranges as they were calibrated."""


BY_ERROR = partial(multipoint, budget=BUDGET, compare="power")  # as the tables were measured
KINDS: dict[str, tuple[dict, Callable]] = {
    "one point, mse range": ({}, nothing),
    "the same, symmetric": ({"symmetric": True}, nothing),
    "one point, fitted to outputs": ({"points": 3}, partial(multipoint, budget=1e-9)),
    "10 % of rows at random": ({"points": 3}, partial(at_random, budget=BUDGET, cost="rows", seed=0)),
    "10 % of rows by error": ({"points": 3}, partial(BY_ERROR, cost="rows")),
    "the same, steps as in the paper": ({"points": 3}, partial(BY_ERROR, cost="rows", fit="none")),
    "10 % of cost by error": ({"points": 3}, BY_ERROR),
}


def measured(
    network: nn.Module, kind: str, weights: int, batches: list[Tensor], test: Tensor, labels: Tensor
) -> tuple[float, float, float, float, float]:
    """Accuracy (%), error of the logits, and what was added: rows, multiply-adds (%), bits of a weight."""
    fields, choose = KINDS[kind]
    p = qk.prepare(network, batches[0][:2], qk.Recipe(weights=weights, method="nearest", **fields))
    qk.calibrate(p, batches)
    choose(p, batches)
    with torch.no_grad(), p.quantized() as model:
        found = torch.cat([model(part) for part in test.split(250)])
        expected = torch.cat([network(part) for part in test.split(250)])
    accuracy = 100 * (found.argmax(1) == labels).float().mean().item()
    error = ((found - expected).square().mean() / expected.square().mean()).item()
    extra = overhead(p)
    if extra is None:
        return accuracy, error, 0.0, 0.0, weights
    return accuracy, error, 100 * extra.extra_rows / extra.rows, 100 * extra.extra_macs, extra.bits


def table(networks: list[nn.Module], batches: list[Tensor], test: Tensor, labels: Tensor) -> Table:
    headers = ["weights", "how", "accuracy %", "error", "more rows %", "more multiply-adds %", "bits a weight"]
    rows = []
    for weights in WIDTHS:
        for kind in KINDS:
            runs = [measured(network, kind, weights, batches, test, labels) for network in networks]
            accuracies, *rest = zip(*runs, strict=True)
            spread = f" ({min(accuracies):.1f}-{max(accuracies):.1f})" if len(runs) > 1 else ""
            error, more_rows, macs, bits = map(mean, rest)
            row = [f"W{weights}", kind, f"{mean(accuracies):.2f}{spread}", f"{error:.4f}", f"{more_rows:.1f}"]
            rows.append([*row, f"{macs:.1f}", f"{bits:.2f}"])
            print(*rows[-1], sep=" | ", flush=True)
    return Table("", headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", help="a network of proof/networks.py, on its pictures, instead of the digits")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pictures:
        from proof import networks as pictures

        found = [pictures.trained(pictures.training(options.pictures), options.cache / "proof")]
        test = pictures.test_set()
        made = table(found, pictures.calibration(256), test.images[:2000], test.labels[:2000])
    else:
        data = small_digits.data()
        found = small_digits.networks(options.cache, range(SEEDS))
        made = table(found, small_digits.calibration(512), data.test, data.test_labels)
    print(made.markdown())


if __name__ == "__main__":
    main()
