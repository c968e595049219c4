"""Run by test_memory.py: reconstructs a net and prints its budget, what it would have to cache, and what it took."""

from __future__ import annotations

import json
import sys
import threading

import torch
from torch import nn

from qk.calibrate import calibrate
from qk.methods import reconstruct
from qk.prepare import prepare
from qk.spec import Recipe

BATCHES, ROWS, CHANNELS, SIZE = 384, 2, 16, 40  # small batches: one on its way is small beside the budget


def anonymous() -> float:
    """MB of memory that the process holds for itself: pages of a file, which the system may take back, do not count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak:
    """Watches from a thread of its own."""

    def __enter__(self) -> Peak:
        self.start = self.highest = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def main(budget: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else CHANNELS, CHANNELS, 3, padding=1) for i in range(3)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())]).eval()
    batches = [torch.randn(ROWS, 3, SIZE, SIZE) for _ in range(BATCHES)]
    recipe = Recipe(weights=4, activations=4, iterations=4, batch_size=2, drop=0.5, memory_mb=budget)
    p = prepare(model, batches[0][:2], recipe)
    calibrate(p, batches)
    reconstruct(p, batches[:1], recipe, progress="off")  # what torch allocates once, such as compiled convolutions
    with Peak() as first:
        calibrate(p, batches)
    with Peak() as second:
        reconstruct(p, batches, recipe, progress="off")
    one = BATCHES * ROWS * CHANNELS * SIZE * SIZE * 4 / 2**20  # an activation of the whole data
    found = {"budget": budget, "cached": 3 * one, "batch": 3 * one / BATCHES}  # two inputs and an output of a unit
    print(json.dumps(found | {"calibrate": first.highest - first.start, "reconstruct": second.highest - second.start}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
