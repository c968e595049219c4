"""Accuracy on the digits with nearest rounding, by how steps are chosen: the table of docs/methods/lapq.md."""

from statistics import mean

import torch

from qk.calibrate import calibrate, correct_bias
from qk.prepare import prepare
from qk.spec import Recipe
from small_digits import accuracy, calibration, networks, spread

WIDTHS = ((4, 4), (3, 3), (2, 4), (2, 2))
KINDS = (("minmax", False), ("percentile", False), ("mse", False), ("mse", True), ("lapq", False), ("lapq", True))


def main() -> None:
    torch.set_num_threads(1)
    batches, floats = calibration(), networks()
    print(f"float: {mean(map(accuracy, floats)):.2f}\n")
    print("| | " + " | ".join(ranges + " + bias" * bias for ranges, bias in KINDS) + " |")
    print("|---|" + "---:|" * len(KINDS))
    for weights, activations in WIDTHS:
        cells = []
        for ranges, bias in KINDS:
            found = []
            for network in floats:
                p = prepare(network, batches[0][:2], Recipe(weights=weights, activations=activations))
                calibrate(p, batches, ranges)
                if bias:
                    correct_bias(p, batches)
                with p.quantized() as model:
                    found.append(accuracy(model))
            cells.append(spread(found))
        print(f"| W{weights}A{activations} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
