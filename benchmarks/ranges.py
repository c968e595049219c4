"""Accuracy on the digits with nearest rounding, by how steps are chosen: the table of docs/methods/lapq.md."""

from pathlib import Path
from statistics import mean

import torch

from qk.calibrate import calibrate, correct_bias
from qk.demo.digits import Training, load, trained
from qk.prepare import prepare
from qk.spec import Recipe

SEEDS = (0, 1, 2)
WIDTHS = ((4, 4), (3, 3), (2, 4), (2, 2))
KINDS = (("minmax", False), ("percentile", False), ("mse", False), ("mse", True), ("lapq", False), ("lapq", True))


def main() -> None:
    torch.set_num_threads(1)
    data = load()
    batches = list(data.train[:256].split(64))

    @torch.no_grad()
    def accuracy(model: torch.nn.Module) -> float:
        return 100 * (model(data.test).argmax(1) == data.test_labels).float().mean().item()

    networks = [trained(Training(widths=(16, 32, 32), epochs=10, seed=seed), Path(".cache")) for seed in SEEDS]
    print(f"float: {mean(map(accuracy, networks)):.2f}\n")
    print("| | " + " | ".join(ranges + " + bias" * bias for ranges, bias in KINDS) + " |")
    print("|---|" + "---:|" * len(KINDS))
    for weights, activations in WIDTHS:
        cells = []
        for ranges, bias in KINDS:
            found = []
            for network in networks:
                p = prepare(network, batches[0][:2], Recipe(weights=weights, activations=activations))
                calibrate(p, batches, ranges)
                if bias:
                    correct_bias(p, batches)
                with p.quantized() as model:
                    found.append(accuracy(model))
            cells.append(f"{mean(found):.2f} ({min(found):.1f}-{max(found):.1f})")
        print(f"| W{weights}A{activations} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
