"""What the studies on the digits share: a smaller network than the demo's, trained with three seeds, and its score."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from qk.demo.digits import Digits, Training, load, trained

SEEDS = (0, 1, 2)

data = cache(load)


def networks(folder: str | Path = ".cache", seeds: Iterable[int] = SEEDS) -> list[nn.Module]:
    """One for each seed, from the folder where they are there."""
    return [trained(Training(widths=(16, 32, 32), epochs=10, seed=seed), folder) for seed in seeds]


def calibration(count: int = 256) -> list[Tensor]:
    """The first training images, in batches of 64."""
    return list(data().train[:count].split(64))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Percent of the held-out images."""
    digits: Digits = data()
    return 100 * (model(digits.test).argmax(1) == digits.test_labels).float().mean().item()


def spread(found: Iterable[float]) -> str:
    """Mean, lowest and highest."""
    found = list(found)
    return f"{mean(found):.2f} ({min(found):.1f}-{max(found):.1f})"
