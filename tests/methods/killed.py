"""A quantization as a process of its own, for tests that kill it: python killed.py FOLDER ITERATIONS."""

import sys

import torch
from torch import nn

import qk


def main(folder, iterations):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 36, 10)).eval()
    batches = list(torch.randn(64, 3, 12, 12).split(16))
    recipe = qk.Recipe(weights=3, activations=4, iterations=iterations)
    qk.quantize(model, batches, recipe, out=folder, measure=False, fused=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
