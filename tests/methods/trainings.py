"""A small model, its data, and a training that takes a moment."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qk
from qk.methods import tune
from qk.options import Tuning
from qk.prepare import prepare
from qk.spec import Recipe


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Net(nn.Module):
    """With what makes training depend on the random state and on its mode: dropout, and a norm that stays."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), Unit(), Unit()
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(self.b(self.a(torch.relu(self.stem(self.norm(x))))).mean((2, 3))))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


X = torch.randn(36, 3, 7, 7, generator=torch.Generator().manual_seed(1))
LABELS = X.mean((2, 3)).argmax(1)
LABELLED = list(zip(X.split(12), LABELS.split(12), strict=True))


def shuffled():
    return DataLoader(TensorDataset(X, LABELS), batch_size=12, shuffle=True)


def recipe(**tuning):
    return Recipe(weights=3, activations=4, method="lsq", tuning=Tuning(**({"epochs": 3} | tuning)))


def prepared(model=None):
    p = prepare(model or net(), X[:4], recipe())
    qk.calibrate(p, [X])
    return p


def tuned(p=None, train=None, wanted=None, **more):
    p = p or prepared()
    tune(p, shuffled() if train is None else train, wanted or recipe(), **({"progress": "off"} | more))
    return p


def same(p, other):
    first, second = p.model.state_dict(), other.model.state_dict()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items()) and p.history == other.history


class Interrupting:
    """Cross entropy that is interrupted at a call."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, output, labels):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(output, labels)
