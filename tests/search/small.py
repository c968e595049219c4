"""A small residual network that has learned a little, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two layers that read one tensor (linked), one behind, an addition."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, stride=stride)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.skip(x))


class Net(nn.Module):
    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = Residual(16, 2), Residual(16)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(torch.relu(self.stem(x)))).mean((2, 3)))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().eval()
        with torch.no_grad():
            model.head.weight *= 20  # logits that differ
        return model


def data(batches: int = 3, rows: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, 12, 12, generator=rng) for _ in range(batches)]
