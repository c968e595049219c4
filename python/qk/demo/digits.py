"""The digits that scikit-learn carries, and a small residual network that reads them.

1,797 images of 8x8 pixels (E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998). The split
into 1,297 images for training and 500 held out is fixed; seeds change the network alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qk.errors import fail
from qk.files import replace_file

HELD_OUT = 500
CLASSES = 10


@dataclass(frozen=True)
class Training:
    """How the network is made and trained; the cached weights are bound to these values."""

    widths: tuple[int, ...] = (32, 64, 96)
    epochs: int = 24
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8], normalized by the training images' mean and deviation; labels [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Raises QkError where scikit-learn, which holds the images, is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise fail(
            "digits", "scikit-learn, which holds them,", "installed", error, "pip install qk-torch[demo]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    mean, deviation = x[training].mean(), x[training].std()
    x = (x - mean) / deviation
    return Digits(x[training], y[training], x[held_out], y[held_out])


class Block(nn.Module):
    """Residual unit; a 1x1 convolution takes the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class DigitsNet(nn.Module):
    """[n, 1, 8, 8] -> [n, 10]: a stem, a residual unit per width (each but the first halves the image), a Linear."""

    def __init__(self, widths: tuple[int, ...] = Training.widths) -> None:
        super().__init__()
        first = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        units = [Block(first, first, 1)]
        units += [Block(a, b, 2) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*units)
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def untrained(config: Training) -> DigitsNet:
    """With the first weights of its seed; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DigitsNet(config.widths)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 11 degrees, scaled by up to 10 %, moved by up to 0.6 pixels."""
    n, paper = len(x), x.amin()

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale, dx, dy = uniform(0.2), 1 + uniform(0.1), uniform(0.15), uniform(0.15)
    top = torch.stack([angle.cos() * scale, -angle.sin(), dx], 1)
    bottom = torch.stack([angle.sin(), angle.cos() * scale, dy], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x - paper, grid, align_corners=False) + paper


@dataclass(frozen=True)
class Augmented:
    """The training images, in each pass in another order and turned, scaled and moved anew; torch's random numbers
    decide."""

    data: Digits
    batch_size: int = Training.batch_size

    def __len__(self) -> int:
        return -(-len(self.data.train) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        for index in torch.randperm(len(self.data.train), generator=generator).split(self.batch_size):
            yield augment(self.data.train[index], generator), self.data.train_labels[index]


def train(data: Digits, config: Training) -> DigitsNet:
    """A trained network in eval mode."""
    model = untrained(config)
    generator = torch.Generator().manual_seed(config.seed)
    steps = -(-len(data.train) // config.batch_size) * config.epochs
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    model.train()
    for _ in range(config.epochs):
        for index in torch.randperm(len(data.train), generator=generator).split(config.batch_size):
            prediction = model(augment(data.train[index], generator))
            loss = F.cross_entropy(prediction, data.train_labels[index], label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def default_cache() -> Path:
    """XDG_CACHE_HOME/qk, or ~/.cache/qk."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qk"


def trained(config: Training | None = None, cache: str | Path | None = None) -> DigitsNet:
    """The trained network, from the cache where it is there and fits `config`, else trained now and cached."""
    config = config or Training()
    key = json.dumps(asdict(config), sort_keys=True)
    name = f"digits-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    path = (Path(cache) if cache else default_cache()) / name
    model = untrained(config).eval()
    if _read(path, key, model):
        return model
    model = train(load(), config)
    replace_file(path, save({n: t.contiguous() for n, t in model.state_dict().items()}, metadata={"training": key}))
    return model


def _read(path: Path, key: str, model: nn.Module) -> bool:
    """Loads the cached weights; False for a file that is missing, cut off, of another network or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("training") != key:
                return False
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safetensors file
        if not all(torch.isfinite(t).all() for t in state.values()):
            return False
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True
