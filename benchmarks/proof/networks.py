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

TRAINED_ON, TESTED_ON = 20_000, 20_000  # in a pass
CALIBRATION_SEED, TEST_SEED = 1, 2  # of pictures
DRAWS_APART = 1000  # seeds between one draw of pictures to calibrate with and the next
EVALUATED = 500  # pictures at a time
STEMS = {"mobilenet_v2": "features.0.0", "regnet_x_400mf": "stem.0"}  # whose stride is taken out


@dataclass(frozen=True)
class Training:
    """How a network is trained; a cached one is bound to these values and to the definition of the pictures.

    passes: each of pictures drawn for it, so that a network sees none twice.
    optimizer: "sgd" (with Nesterov's momentum) or "adamw".
    """

    name: str
    seed: int = 0
    passes: int = 12
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05


# What differs from resnet18's: passes, so that all are between 80 and 95 %, where differences show. With SGD at rates
# from 0.01 to 0.05 regnet_x_400mf stays at chance for 250 iterations; with AdamW it leaves it after 100.
TRAININGS = {
    "vgg": Training("vgg", passes=8),
    "mobilenet_v2": Training("mobilenet_v2", passes=8),
    "regnet_x_400mf": Training("regnet_x_400mf", passes=8, optimizer="adamw", lr=0.002, weight_decay=0.05),
}


@cache
def test_set() -> shapes.Pictures:
    return shapes.draw(TESTED_ON, TEST_SEED)


def calibration(count: int = 1024, rows: int = 64, draw: int = 0) -> list[Tensor]:
    """Pictures in batches. draw: 0 for those of every study, others for others."""
    return list(shapes.draw(count, CALIBRATION_SEED + DRAWS_APART * draw).images.split(rows))


@dataclass(frozen=True)
class Drawn:
    """Batches of pictures and labels, each pass of its own ones, drawn from the caller's random state."""

    batch_size: int = Training.batch_size

    def __len__(self) -> int:
        return -(-TRAINED_ON // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = shapes.draw(TRAINED_ON, int(torch.randint(2**31, ())))
        yield from zip(data.images.split(self.batch_size), data.labels.split(self.batch_size), strict=True)


@torch.no_grad()
def accuracy(model: nn.Module, count: int = TESTED_ON) -> float:
    """Share of the first `count` test pictures that the model names."""
    images, labels = (part[:count] for part in (test_set().images, test_set().labels))
    found = [model(some).argmax(1) for some in images.split(EVALUATED)]
    return (torch.cat(found) == labels).float().mean().item()


def fingerprint(model: nn.Module) -> str:
    """Of its weights: rows of a study belong to them."""
    return digest(sorted(model.state_dict().items()))[:12]


def untrained(name: str) -> nn.Module:
    """resnet18, mobilenet_v2 or regnet_x_400mf of torchvision for 24 classes; vgg: a small VGG with BatchNorm (six 3x3
    convolutions and a Linear), as the ones there have 119 million weights in their Linears.

    mobilenet_v2 and regnet_x_400mf stay at chance for long on these pictures. So theirs come without the first halving
    of the picture and without dropout, and with residual branches that begin at 0 where the shortcut is the identity: a
    shortcut of regnet_x_400mf that is a convolution sees one pixel in four.
    """
    sources.import_torchvision()
    from torchvision import models

    if name == "vgg":
        features = models.vgg.make_layers([16, 16, "M", 32, 32, "M", 64, 64, "M"], batch_norm=True)
        model = models.VGG(features, num_classes=shapes.CLASSES)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(64, shapes.CLASSES)
        return model
    model = getattr(models, name)(num_classes=shapes.CLASSES)
    if name in STEMS:
        model.get_submodule(STEMS[name]).stride = (1, 1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif getattr(module, "use_res_connect", False):  # of mobilenet_v2
                nn.init.zeros_(module.conv[-1].weight)
            elif isinstance(module, models.regnet.ResBottleneckBlock) and module.proj is None:
                nn.init.zeros_(module.f.c[1].weight)
    return model


def train(config: Training, say: Callable[[str], object] = print) -> nn.Module:
    """In eval mode. The caller's random state is left as it was."""
    batches = Drawn(config.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = untrained(config.name).to(memory_format=torch.channels_last).train()
        rates = {"lr": config.lr, "weight_decay": config.weight_decay}
        if config.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **rates)
        else:
            optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **rates)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, epochs=config.passes, steps_per_epoch=len(batches)
        )
        for number in range(config.passes):
            began, total = time.perf_counter(), 0.0
            for images, labels in batches:
                images = images.contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(images)
            seconds = time.perf_counter() - began
            say(f"{config.name} seed {config.seed}: pass {number + 1}, loss {total / TRAINED_ON:.3f}, {seconds:.0f} s")
    return model.to(memory_format=torch.contiguous_format).eval()


def training(name: str) -> Training:
    """Of the studies' network of this name."""
    return TRAININGS.get(name, Training(name))


def trained(config: Training, folder: str | Path) -> nn.Module:
    """From the folder where it is there, else trained now and put there."""
    key = asdict(config) | {"pictures": digest([("", shapes.draw(8, CALIBRATION_SEED).images)])}
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
        print(f"{network}: {100 * accuracy(trained(training(network), '.cache/proof')):.2f} %", flush=True)
