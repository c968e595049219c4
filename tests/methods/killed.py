"""A quantization as a process of its own, for those that kill it: python killed.py FOLDER CASE ITERATIONS."""

import sys

import torch
from torch import nn

import qk

CASES = {
    "weights_first": {"order": "weights_first"},
    "drops": {"drop": 0.5, "drop_inside": True, "loss": "fisher"},
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return (x + self.body(x)).relu()


def main(folder, case, iterations):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Residual(), Residual(), head).eval()
    batches = list(torch.randn(64, 3, 12, 12).split(16))
    recipe = qk.Recipe(weights=3, activations=4, iterations=iterations, **CASES[case])
    qk.quantize(model, batches, recipe, out=folder, measure=False, fused=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
