"""torchvision's networks trained on the drawn pictures, kept in a cache folder: what the studies quantize."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from proof import shapes
from qk import sources
from qk.files import replace_file
from qk.inputs import digest

TRAINED_ON, TESTED_ON = 20_000, 4_000
TRAIN_SEED, TEST_SEED = 1, 2
EVALUATED = 500  # pictures at a time


@dataclass(frozen=True)
class Training:
    """How a network is trained; a cached one is bound to these values and to the definition of the pictures."""

    name: str
    seed: int = 0
    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05


@cache
def training_set() -> shapes.Pictures:
    return shapes.draw(TRAINED_ON, TRAIN_SEED)


@cache
def test_set() -> shapes.Pictures:
    return shapes.draw(TESTED_ON, TEST_SEED)


def calibration(count: int = 1024, rows: int = 64) -> list[Tensor]:
    """The first training pictures, in batches."""
    return list(training_set().images[:count].split(rows))


@dataclass(frozen=True)
class Augmented:
    """The training pictures and their labels for qk.tune, in each pass in another order, mirrored and moved anew."""

    batch_size: int = Training.batch_size

    def __len__(self) -> int:
        return -(-len(training_set()) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = training_set()
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))  # of the caller's seed
        for index in torch.randperm(len(data), generator=generator).split(self.batch_size):
            yield shapes.augment(data.images[index], generator), data.labels[index]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test pictures that the model names."""
    data = test_set()
    found = [model(images).argmax(1) for images in data.images.split(EVALUATED)]
    return (torch.cat(found) == data.labels).float().mean().item()


def untrained(name: str) -> nn.Module:
    """resnet18, mobilenet_v2 or regnet_x_400mf as torchvision has them, for 24 classes; vgg: a small VGG with
    BatchNorm (six 3x3 convolutions and a Linear), as the ones there have 119 million weights in their Linears."""
    sources.import_torchvision()
    from torchvision import models

    if name == "vgg":
        features = models.vgg.make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M"], batch_norm=True)
        model = models.VGG(features, num_classes=shapes.CLASSES)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(64, shapes.CLASSES)
        return model
    return getattr(models, name)(num_classes=shapes.CLASSES)


def train(config: Training, say: Callable[[str], object] = print) -> nn.Module:
    """In eval mode. The caller's random state is left as it was."""
    data = training_set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = untrained(config.name)
        generator = torch.Generator().manual_seed(config.seed)
        steps = -(-len(data) // config.batch_size) * config.epochs
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
        for epoch in range(config.epochs):
            model.train()
            began, total = time.perf_counter(), 0.0
            for index in torch.randperm(len(data), generator=generator).split(config.batch_size):
                images = shapes.augment(data.images[index], generator)
                loss = F.cross_entropy(model(images), data.labels[index], label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(index)
            seconds = time.perf_counter() - began
            say(f"{config.name} seed {config.seed}: epoch {epoch + 1}, loss {total / len(data):.3f}, {seconds:.0f} s")
    return model.eval()


def trained(config: Training, folder: str | Path) -> nn.Module:
    """From the folder where it is there, else trained now and put there."""
    key = asdict(config) | {"pictures": digest([("", shapes.draw(8, TRAIN_SEED).images)])}
    return kept(folder, config.name, key, lambda: untrained(config.name), lambda: train(config, say))


def kept(
    folder: str | Path, name: str, key: dict[str, Any], empty: Callable[[], nn.Module], train: Callable[[], nn.Module]
) -> nn.Module:
    """What `train` gives, from a file of the folder where an earlier run with this key put it; in eval mode.

    empty: makes the module that the file's tensors fill.
    """
    path = Path(folder) / f"{name}-{digest([(json.dumps(key, sort_keys=True), '')])[:12]}.safetensors"
    if path.exists():
        model = empty()
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train().eval()
    replace_file(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    return model


def say(line: str) -> None:
    """Progress of training, apart from results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for network in sys.argv[1:]:
        print(f"{network}: {100 * accuracy(trained(Training(network), '.cache/proof')):.2f} %", flush=True)
