"""Devices on the digits, and the network for this machine beside qk.fuse's: the tables of docs/hago.md.

    PYTHONPATH=python:benchmarks python benchmarks/hago_devices.py [--networks resnet18,mobilenet_v2]

Accuracy of the integer networks on the held-out digits, three seeds. Then, with random weights, the found network and
the default one of W8A8 in turns in one process, batch 1.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch

import qk
import small_digits
from qk.hago import Found
from qk.sources import load_model
from qk.tables import Table
from qk.timing import alternate, quantile

LIMITED = {"nvidia_sm80": 0.6, "int16_accumulator": 0.75}
SIZE = 224


def digits() -> Table:
    """Accuracy by device and tuner."""
    batches, networks = small_digits.calibration(), small_digits.networks()
    floats = [small_digits.accuracy(network) for network in networks]
    table = Table("", ["device", "tuner", "limit", "accuracy, %", "loss", "trials"])
    table.rows.append(["float", "", "", small_digits.spread(floats), "", ""])
    for device in qk.Hardware.shipped():
        if device.startswith("x86_avx2") or device in ("nvidia_sm89", "nvidia_sm90"):
            continue  # the same arithmetic as one that is there
        for tuner in ("default", "greedy", "random", "annealing", "exact"):
            limit = LIMITED.get(device)
            if tuner in ("default", "greedy"):
                _row(table, device, tuner, None, batches, networks)
            if limit is not None and tuner != "default":
                _row(table, device, tuner, limit, batches, networks)
    return table


def _row(table: Table, device: str, tuner: str, limit: float | None, batches: list, networks: list) -> None:
    found = [qk.hago(n, batches, device, tuner=tuner, limit=limit) for n in networks]
    for f in found:
        assert torch.equal(f.simulate(batches[0]), f.model(batches[0]))
    scores = small_digits.spread(small_digits.accuracy(f.fused or f.model) for f in found)
    loss = f"{mean(f.strategy.loss for f in found):.4f}"
    trials = f"{mean(len(f.history) for f in found):.0f}"
    table.rows.append([device, tuner, limit, scores, loss, trials])
    print(table.rows[-1], flush=True)


def speed(names: list[str]) -> Table:
    """Milliseconds and distance from the float network, of both."""
    table = Table("", ["network", "found, ms", "fuse W8A8, ms", "fuse / found", "found, dB", "fuse, dB"])
    for name in names:
        torch.manual_seed(0)
        network = load_model(f"torchvision:{name}", None).eval()
        batches = [torch.randn(4, 3, SIZE, SIZE) for _ in range(2)]
        found: Found = qk.hago(network, batches, "x86_avx512_vnni", tuner="default")
        p = qk.prepare(network, batches[0], qk.Recipe(weights=8, activations=8, method="nearest"))
        qk.calibrate(p, batches)
        fused = qk.fuse(qk.convert(p), batches)
        with torch.no_grad():
            expected = network(batches[0])
            noise = [float((run(batches[0]) - expected).norm() / expected.norm()) for run in (found.fused, fused)]
            one = batches[0][:1].clone()
            times = alternate([lambda f=found.fused, x=one: f(x), lambda f=fused, x=one: f(x)], 6.0, 30)
        ms = [quantile(t, 0.5) for t in times]
        decibels = [f"{-20 * torch.tensor(n).log10():.1f}" for n in noise]
        table.rows.append([name, *(f"{t:.2f}" for t in ms), f"{ms[1] / ms[0]:.2f}", *decibels])
        print(table.rows[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet18,mobilenet_v2,resnet50")
    parser.add_argument("--only", choices=("digits", "speed"))
    given = parser.parse_args()
    if given.only != "speed":
        print(digits().markdown())
    if given.only != "digits":
        print(speed(given.networks.split(",")).markdown())


if __name__ == "__main__":
    main()
