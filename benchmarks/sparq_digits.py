"""SPARQ on the digits, three seeds: the tables of docs/methods/sparq.md.

Weights of 8 bits, activations of all layers but the first and last cut, by nearest rounding. For each choice the share
of test images met and the power of the float network's logits over that of their error. --pictures NAME does the same
for a network trained on the drawn pictures of benchmarks/proof, one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import qk
import small_digits
from qk.deploy.measure import sqnr
from qk.options import Sparq, Window
from qk.prepare import Prepared
from qk.spec import Recipe

WINDOWS: tuple[Window, ...] = ("5opt", "3opt", "2opt", "6opt", "7opt")


@dataclass(frozen=True)
class Task:
    """A network, its calibration batches and test data."""

    network: nn.Module
    batches: list[Tensor]
    images: Tensor
    labels: Tensor


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(250)])


def score(task: Task, found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Accuracy in percent, SQNR of the logits in dB."""
    accuracy = 100 * (found.argmax(1) == task.labels).float().mean().item()
    noise = (found.double() - expected.double()).square().sum().item()
    return accuracy, sqnr(expected.double().square().sum().item(), noise)


def prepared(task: Task, recipe: Recipe) -> Prepared:
    p = qk.prepare(task.network, task.batches[0][:2], recipe)
    qk.calibrate(p, task.batches)
    return p


def quantized(task: Task, recipe: Recipe, statistics: bool = False, learn: int = 0) -> Tensor:
    """Logits of the quantized network on the test images."""
    recipe = replace(recipe, iterations=learn or 1)
    p = prepared(task, recipe)
    if learn:
        qk.reconstruct(p, task.batches, recipe, progress="off")
    if statistics:
        qk.match_statistics(p, task.batches)
    with p.quantized() as model:
        return outputs(model, task.images)


Rows = Iterator[tuple[str, Callable[[Task], Tensor]]]


def table(title: str, tasks: list[Task], rows: Rows) -> None:
    print(f"\n{title}\n\n| | accuracy (%) | SQNR (dB) |\n|---|---:|---:|")
    floats = [outputs(task.network, task.images) for task in tasks]
    for name, run in rows:
        scores = [score(task, run(task), expected) for task, expected in zip(tasks, floats, strict=True)]
        accuracies, ratios = zip(*scores, strict=True)
        spread = f" ({min(accuracies):.1f}-{max(accuracies):.1f})" if len(tasks) > 1 else ""
        print(f"| {name} | {mean(accuracies):.2f}{spread} | {mean(ratios):.1f} |", flush=True)


def recipe(sparq: Sparq | None = None, **fields: Any) -> Recipe:
    return Recipe(**{"weights": 8, "activations": 8, "sparq": sparq, "method": "nearest"} | fields)


def named(sparq: Sparq) -> str:
    how = "rounded" if sparq.round else "cut off"
    return f"{sparq.window} {how}" + ("" if sparq.pairs == "channels" else ", no pairs")


def windows() -> Rows:
    """Every window, with and without pairs, between whole codes and plain ones of fewer bits."""
    yield "W8A8", lambda task: quantized(task, recipe())
    for window, round, pairs in product(WINDOWS, (True, False), ("channels", "none")):
        sparq = Sparq(window, round, pairs)
        yield named(sparq), lambda task, sparq=sparq: quantized(task, recipe(sparq))
    for bits in (4, 3, 2):
        yield f"W8A{bits}, plain", lambda task, bits=bits: quantized(task, recipe(activations=bits))


def statistics() -> Rows:
    for window, round, matched in product(("5opt", "2opt", "7opt"), (True, False), (False, True)):
        sparq = Sparq(window, round)
        name = named(sparq) + ", statistics matched" * matched
        yield name, lambda task, sparq=sparq, matched=matched: quantized(task, recipe(sparq), matched)


def learning(weights: int, iterations: int) -> Rows:
    for window, steps in product((None, "5opt", "7opt"), (0, iterations)):
        wanted = recipe(window, weights=weights)
        name = f"W{weights}A8 {window or 'whole'}, {'BRECQ' if steps else 'nearest'}"
        yield name, lambda task, wanted=wanted, steps=steps: quantized(task, wanted, learn=steps)


def budgets(task: Task) -> None:
    """A window for each layer."""
    expected = outputs(task.network, task.images)
    print("\n| budget | windows | accuracy (%) | SQNR (dB) |\n|---|---|---:|---:|")
    for cost, bits in [*product(("stored",), (7.5, 6.5, 6.0, 5.5)), *product(("multiplied",), (4, 3.5, 3, 2.5, 2))]:
        p = prepared(task, recipe("5opt"))
        chosen = [c.window or "whole" for c in qk.choose_windows(p, task.batches[:1], bits, cost).values()]
        with p.quantized() as model:
            accuracy, ratio = score(task, outputs(model, task.images), expected)
        counts = ", ".join(f"{chosen.count(w)} {w}" for w in ("whole", *WINDOWS) if w in chosen)
        print(f"| {bits} bits {cost} | {counts} | {accuracy:.2f} | {ratio:.1f} |", flush=True)


def inputs(task: Task) -> None:
    print("\n| layer | zeros | pairs with one 0 | below 16 | beside a 0 | shifts 0 to 4 (%) | SQNR (dB) |")
    print("|---|---:|---:|---:|---:|---|---:|")
    for name, x in qk.input_statistics(prepared(task, recipe("5opt")), task.batches[:2]).items():
        shifts = " ".join(f"{100 * share:.0f}" for share in x.shifts.values())
        shares = " | ".join(f"{100 * share:.0f} %" for share in (x.zeros, x.one_zero, x.small, x.wide))
        print(f"| {name} | {x.reason} |" if x.reason else f"| {name} | {shares} | {shifts} | {x.sqnr_db:.1f} |")


def digits() -> list[Task]:
    data, batches = small_digits.data(), small_digits.calibration()
    return [Task(network, batches, data.test, data.test_labels) for network in small_digits.networks()]


def pictures(name: str, folder: str) -> list[Task]:
    from proof import networks

    test, model = networks.test_set(), networks.trained(networks.training(name), folder)
    return [Task(model, networks.calibration(256), test.images, test.labels)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", help="a network of benchmarks/proof instead of the digits")
    parser.add_argument("--cache", default=".cache/proof", help="where that network lies")
    parser.add_argument("--weights", type=int, default=4, help="bits of the weights that are learned")
    parser.add_argument("--iterations", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = pictures(args.pictures, args.cache) if args.pictures else digits()
    table("The float network", tasks, iter([("float", lambda task: outputs(task.network, task.images))]))
    table("Windows, weights of 8 bits, nearest rounding", tasks, windows())
    table("Statistics matched", tasks, statistics())
    table(
        f"Learned with the cut active, {args.iterations} iterations a unit",
        tasks,
        learning(args.weights, args.iterations),
    )
    budgets(tasks[0])
    inputs(tasks[0])


if __name__ == "__main__":
    main()
