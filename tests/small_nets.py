"""Nets of a few layers, wired as a test says."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Calls a function of itself and the inputs, so that a test can say how its parts are wired."""

    def __init__(self, wiring, **parts):
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.wiring(self, *args, **kwargs)


class Residual(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.b(self.relu(self.a(x))) + x)


def residual_net(blocks: int = 2) -> nn.Module:
    """For inputs [B, 4, 6, 6]."""
    return nn.Sequential(nn.Conv2d(4, 4, 3), *[Residual() for _ in range(blocks)], nn.Flatten(), nn.Linear(64, 3))


def convs(n: int) -> dict[str, nn.Module]:
    """conv1 .. convN that keep the shape of [B, 4, H, W]."""
    return {f"conv{i}": nn.Conv2d(4, 4, 3, padding=1) for i in range(1, n + 1)}


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 6), generator=torch.Generator().manual_seed(0))


def assert_same(prepared: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Equal outputs, bit for bit, of a prepared model in which nothing was folded."""
    with torch.no_grad():
        ours, theirs = prepared(x.clone()), model.eval()(x.clone())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Encoder(nn.Module):
    """Queries and keys that read one tensor, a feed-forward with a residual, a head. For inputs [B, T, 16]."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = x + torch.softmax(self.query(x) @ self.key(x).mT, -1) @ x
        return self.head(x + self.down(torch.relu(self.up(x))))


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder().eval()
