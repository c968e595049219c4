"""A training as a process of its own, for tests that kill it: python killed_training.py FOLDER."""

import sys

import torch
from torch import nn

import qk


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(8 * 64, 10)).eval()
    x = torch.randn(128, 3, 12, 12)
    train = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.arange(128) % 10), batch_size=16, shuffle=True
    )
    recipe = qk.Recipe(weights=3, activations=4, method="lsq", tuning=qk.Tuning(epochs=40))
    qk.quantize(model, list(x.split(16)), recipe, train=train, out=folder, measure=False, fused=False)


if __name__ == "__main__":
    main(sys.argv[1])
