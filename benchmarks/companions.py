"""Figures of docs/methods/gptq.md, equalize.md and smooth.md: how far quantized outputs are from float ones.

    python benchmarks/companions.py gptq|equalize|smooth [--cache .cache]

gptq: the demo's network on the digits. equalize: a small MobileNetV2 with ReLU6 trained on the digits, three seeds, and
the same with channels scaled apart. smooth: embeddings of docstrings by all-MiniLM-L6-v2.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

import qk
import small_digits
from qk import sources
from qk.demo.digits import augment, load
from qk.files import replace_file
from qk.prepare.scaling import scale
from qk.spec import Recipe

SEEDS = (0, 1, 2)


def decibels(found: Tensor, expected: Tensor) -> float:
    return 10 * math.log10(float(expected.square().sum() / (found - expected).square().sum()))


def table(rows: list[str], columns: list[str], cell: Callable[[str, str], str]) -> None:
    print("| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for row in rows:
        print(f"| {row} | " + " | ".join(cell(row, column) for column in columns) + " |", flush=True)


def spread(values: list[float], digits: int = 1) -> str:
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- gptq -------------------------------------------------------------------------------------------------------------

SOLVERS = {
    "nearest": Recipe(method="nearest"),
    "gptq, columns as they lie": Recipe(method="gptq", act_order=False),
    "gptq": Recipe(method="gptq"),
    "gptq, float prefix": Recipe(method="gptq", prefix="float"),
    "brecq, 500 iterations": Recipe(method="brecq", iterations=500, batch_size=32),
}


def gptq(cache: Path) -> None:
    data, batches, networks = small_digits.data(), small_digits.calibration(), small_digits.networks(cache)

    def cell(width: str, solver: str) -> str:
        weights, activations = int(width[1]), int(width[3])
        found, right, seconds = [], [], []
        for seed, network in enumerate(networks):
            recipe = Recipe.from_dict(SOLVERS[solver].to_dict() | {"weights": weights, "activations": activations})
            p = qk.prepare(network, batches[0][:2], recipe)
            qk.calibrate(p, batches, seed=seed)
            began = time.perf_counter()
            if recipe.method == "gptq":
                qk.gptq(p, batches, recipe, progress="off")
            if recipe.method == "brecq":
                qk.reconstruct(p, batches, recipe, progress="off")
            seconds.append(time.perf_counter() - began)
            with p.quantized() as model, torch.no_grad():
                output = model(data.test)
                found.append(decibels(output, network(data.test)))
            right.append(100 * (output.argmax(1) == data.test_labels).float().mean().item())
        return f"{mean(found):.1f} dB, {spread(right)} %, {mean(seconds):.1f} s"

    table(["W4A4", "W3A3", "W2A4", "W2A2"], list(SOLVERS), cell)


# --- equalize ---------------------------------------------------------------------------------------------------------


def large(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(16, 16), mode="bilinear")


def mobile() -> nn.Module:
    """torchvision's MobileNetV2, smaller, for [n, 1, 16, 16]."""
    sources.import_torchvision()
    from torchvision.models import MobileNetV2

    setting = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2]]
    model = MobileNetV2(num_classes=10, width_mult=0.5, inverted_residual_setting=setting, dropout=0.0)
    model.features[0][0] = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    model.features[-1] = nn.Sequential(nn.Conv2d(32, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6(True))
    model.classifier = nn.Linear(128, 10)
    return model


def trained_mobile(seed: int, cache: Path, epochs: int = 12) -> nn.Module:
    path = cache / f"mobile-digits-{seed}.safetensors"
    torch.manual_seed(seed)
    model = mobile()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    data, generator = load(), torch.Generator().manual_seed(seed)
    steps = -(-len(data.train) // 64) * epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train), generator=generator).split(64):
            output = model(large(augment(data.train[index], generator)))
            loss = F.cross_entropy(output, data.train_labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    replace_file(path, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    return model.eval()


def equalize(cache: Path) -> None:
    data = load()
    batches, test = [large(x) for x in data.train[:256].split(64)], large(data.test)
    networks = [trained_mobile(seed, cache) for seed in SEEDS]
    with torch.no_grad():
        right = [100 * (n(test).argmax(1) == data.test_labels).float().mean().item() for n in networks]
    print(f"float: {spread(right)} %\n")
    clips = []

    def cell(row: str, kind: str) -> str:
        width, apart = row.split(maxsplit=1) if " " in row else (row, "")
        found, right = [], []
        for seed, network in enumerate(networks):
            recipe = Recipe(weights=int(width[1]), activations=int(width[3]), method="nearest")
            p = qk.prepare(network, batches[0][:2], recipe)
            if kind != "as it is" or apart:
                clips.append(qk.unclip(p, batches))
            if apart:
                generator = torch.Generator().manual_seed(seed)
                for path in p.paths:
                    scale(p, path, 10 ** (2 * torch.rand(path.channels, generator=generator).double() - 1))
            with torch.no_grad():
                floating = p.model(test)
            if kind == "equalized":
                qk.equalize(p)
            if kind.startswith("smoothed"):
                qk.smooth(p, batches, "search" if "search" in kind else 0.5)
            qk.calibrate(p, batches)
            with p.quantized() as model, torch.no_grad():
                output = model(test)
            found.append(decibels(output, floating))
            right.append(100 * (output.argmax(1) == data.test_labels).float().mean().item())
        return f"{spread(found)} dB, {mean(right):.1f} %"

    rows = ["W8A8", "W4A8", "W4A4", "W8A8 apart", "W4A8 apart"]
    table(rows, ["as it is", "ReLU", "equalized", "smoothed 0.5", "smoothed search"], cell)
    print(f"\nReLU in place of ReLU6 in float: {min(clips):.1f} to {max(clips):.1f} dB")


# --- smooth -----------------------------------------------------------------------------------------------------------


def smooth(_: Path) -> None:
    from proof.retrieval import Retrieval

    task = Retrieval()
    texts = [text for pair in task.ranked[:32] for text in pair]
    batches, test = task.calibration[:3], list(task.batches(texts))

    @torch.no_grad()
    def embedded(model: nn.Module) -> Tensor:
        return torch.cat([model(**batch) for batch in test])

    expected = embedded(task.model)

    def cell(width: str, kind: str) -> str:
        recipe = Recipe(weights=int(width[1]), activations=int(width[3]), method="nearest", first_last=None)
        began = time.perf_counter()
        p = qk.prepare(task.model, batches[0], recipe)
        if "search" in kind or "alpha" in kind:
            qk.smooth(p, batches, "search" if "search" in kind else float(kind.split()[1]))
        qk.calibrate(p, batches)
        if "gptq" in kind:
            qk.gptq(p, batches, progress="off")
        seconds = time.perf_counter() - began
        with p.quantized() as model:
            cosines = (embedded(model) * expected).sum(1)
        return f"{cosines.mean():.4f} ({cosines.min():.3f}), {seconds:.0f} s"

    table(["W8A8", "W4A8"], ["nearest", "alpha 0.5", "alpha 0.7", "search", "gptq", "search, gptq"], cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("which", choices=("gptq", "equalize", "smooth"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"gptq": gptq, "equalize": equalize, "smooth": smooth}[options.which](options.cache)


if __name__ == "__main__":
    main()
