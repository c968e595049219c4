"""A small residual network on scikit-learn's digits, trained once and kept in pytest's cache folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "digits-1"  # of network and training


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inside + self.shortcut(x))


@dataclass
class Digits:
    model: nn.Module
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images."""
        with torch.no_grad():
            return 100 * (model(self.test_images).argmax(1) == self.test_labels).float().mean().item()


def network() -> nn.Module:
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    body = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def load(folder: Path) -> Digits:
    """folder: where the trained weights are kept."""
    source = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(source.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    found = Digits(network(), images[train], labels[train], images[test], labels[test])
    file = folder / f"{VERSION}.pt"
    if file.exists():
        found.model.load_state_dict(torch.load(file, weights_only=True))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.model = network()
            _train(found)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(found.model.state_dict(), file)
    found.model.eval()
    return found


def _train(data: Digits, epochs: int = 15, batch: int = 64) -> None:
    """About three seconds. On one thread: so small a network loses with more, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = -(-len(data.images) // batch)
    optimizer = torch.optim.Adam(data.model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * count)
    data.model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.images)).split(batch):
            F.cross_entropy(data.model(data.images[chosen]), data.labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    torch.set_num_threads(threads)
