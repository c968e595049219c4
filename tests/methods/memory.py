"""Reconstructs a net and prints its budget, what it would have to cache, and what it took, all in MB, for
test_memory.py: python memory.py BUDGET ROWS [FIELD=VALUE of a recipe, in JSON]..."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from qk.calibrate import calibrate
from qk.methods import reconstruct
from qk.prepare import prepare
from qk.spec import Recipe
from resident import Peak

CHANNELS, SIZE, TOGETHER = 16, 64, 2  # TOGETHER: rows of a batch
ACTIVATION = TOGETHER * CHANNELS * SIZE * SIZE * 4 / 2**20  # of a batch


def main(budget: int, rows: int, more: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(4 if i == 0 else CHANNELS, CHANNELS, 3, padding=1) for i in range(2)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())]).eval()
    batches = list(torch.randn(rows, 4, SIZE, SIZE).split(TOGETHER))
    asked = {"weights": 4, "activations": 4, "iterations": 4, "drop": 0.5, "batch_size": TOGETHER} | more
    recipe = Recipe.from_dict(asked | {"memory_mb": budget})
    p = prepare(model, batches[0], recipe)
    calibrate(p, batches[:2], recipe.ranges, memory_mb=budget)
    reconstruct(p, batches[:1], recipe, progress="off")  # what torch allocates once, such as compiled convolutions
    with Peak() as first:
        calibrate(p, batches, recipe.ranges, memory_mb=budget)
    with Peak() as second:
        reconstruct(p, batches, recipe, progress="off")
    # Of a unit: two inputs, an output, with Fisher weights also these and what the model gave.
    tensors = 3 if recipe.loss == "mse" else 5
    found = {"budget": budget, "cached": tensors * len(batches) * ACTIVATION, "activation": ACTIVATION}
    found |= {"calibrate": first.rise, "reconstruct": second.rise}
    print(json.dumps(found))


if __name__ == "__main__":
    fields = dict(field.split("=", 1) for field in sys.argv[3:])
    main(int(sys.argv[1]), int(sys.argv[2]), {name: json.loads(value) for name, value in fields.items()})
