"""Models and data named in words: torchvision:resnet18, imagefolder:photos, python:package.module:function."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qk.errors import QkError, fail
from qk.inputs import copied_to, device_of, feed

MODELS = "torchvision:NAME, timm:NAME, hf:PATH or python:MODULE:FUNCTION"
DATA = "digits, imagefolder:DIR or python:MODULE:FUNCTION"


@dataclass(frozen=True)
class Data:
    """calibration: batches of inputs. evaluation: (inputs, labels) batches that can be read more than once, or None.

    train: of the same kind, for each epoch in an order of its own, or None. labels: of calibration, for each batch.
    """

    calibration: list[Any]
    evaluation: Iterable[tuple[Any, Tensor]] | None = None
    train: Iterable[tuple[Any, Tensor]] | None = None
    labels: list[Tensor] | None = None


def load_model(source: str, weights: str | Path | None = None) -> nn.Module:
    """The model in eval mode. Arguments follow a question mark: torchvision:resnet18?num_classes=10.

    Without `weights` a torchvision or timm model has random ones. Raises QkError for a source that is not known, a
    package that is not installed, or weights that do not fit.
    """
    kind, _, rest = source.partition(":")
    name, arguments = _arguments(rest)
    if kind == "torchvision":
        models = import_torchvision().models
        if name not in models.list_models():
            raise fail("model", source, "a name in torchvision.models.list_models()", repr(name))
        model = _made(source, models.get_model, name, weights=None, **arguments)
    elif kind == "timm":
        timm = _package("timm", source)
        if name not in timm.list_models():
            raise fail("model", source, "a name in timm.list_models()", repr(name))
        model = _made(source, timm.create_model, name, pretrained=False, **arguments)
    elif kind == "hf":
        model = _transformer(name, source)
    elif kind == "python":
        model = _made(source, _call(name, source), **arguments)
    else:
        raise fail("model", "source", MODELS, repr(source))
    if not isinstance(model, nn.Module):
        raise fail("model", source, "a function that returns an nn.Module", type(model).__name__)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """A safetensors file, or one of torch.save that holds tensors alone (nothing in it is executed)."""
    path = Path(path)
    if not path.is_file():
        raise fail("weights", str(path), "a file", "none there")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise _unreadable(path, error) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise fail("weights", str(path), "a state dict: names and tensors", type(state).__name__)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise fail("weights", str(path), "weights of this model", " ".join(lines)[:600]) from error


def load_data(source: str, batch_size: int = 32) -> Data:
    """Raises QkError for a source that is not known, holds nothing, or cannot be read."""
    kind, _, rest = source.partition(":")
    name, arguments = _arguments(rest)
    if source == "digits":
        return _digits(batch_size)
    if kind == "imagefolder":
        try:
            return image_folder(name, batch_size=batch_size, **arguments)
        except TypeError as error:
            raise fail("data", source, "options size, resize, calibration, seed", str(error)) from error
    if kind == "python":
        made = _made(source, _call(name, source), **arguments)
        if isinstance(made, tuple) and len(made) in (2, 3, 4):
            made = Data(*made)
        if not isinstance(made, Data) or not isinstance(made.calibration, (list, tuple)):
            expected = (
                "a function that returns (calibration batches in a list, evaluation batches or None[, train[, labels]])"
            )
            raise fail("data", source, expected, type(made).__name__)
        return made
    raise fail("data", "source", DATA, repr(source))


def accuracy(model: nn.Module, evaluation: Iterable[tuple[Any, Tensor]]) -> float:
    """Share of labels that the largest output meets."""
    met = total = 0
    for inputs, labels in evaluation:
        found = predictions(model, inputs)
        if found.shape != labels.shape:
            raise fail("evaluation", "labels", f"{list(found.shape)}, one for each prediction", list(labels.shape))
        met += int((found == labels.to(found.device)).sum())
        total += labels.numel()
    if total == 0:
        raise fail("evaluation", "data", "at least one batch with labels", "none")
    return met / total


def predictions(model: nn.Module, inputs: Any) -> Tensor:
    """The index of the largest output along the last axis."""
    with torch.no_grad():
        result = feed(model, copied_to(inputs, device_of(model)))
    result = getattr(result, "logits", result)
    if not isinstance(result, Tensor):
        raise fail("evaluation", "the model", "one that returns a tensor or .logits", type(result).__name__)
    return result.argmax(-1)


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not load (a wheel for CUDA beside a torch for CPU)."""
    try:
        return _package("torchvision", "torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return _package("torchvision", "torchvision")


_kept: list[Any] = []  # a torch.library.Library undoes its definitions when it goes


# --- images in folders ----------------------------------------------------------------------------------------------
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's and timm's models expect
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def image_folder(
    folder: str, size: int = 224, resize: int = 256, calibration: int = 128, batch_size: int = 32, seed: int = 0
) -> Data:
    """One folder per class. `calibration` images, drawn with `seed`, come from train/ where it is there.

    Where there is no val/ beside it, the images that were not drawn are the evaluation, and those drawn are all there
    is to train on. The short side is scaled to `resize`, the middle `size` x `size` taken (to train on a random part,
    half of the time mirrored), the values normalized as for ImageNet.
    """
    numbers = {"size": size, "resize": resize, "calibration": calibration, "batch_size": batch_size}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise fail("data", f"{name} of imagefolder", "a whole number of at least 1", repr(value))
    root = Path(folder)
    if not folder or not root.is_dir():
        raise fail("data", folder, "a folder of class folders", "none there")
    train = root / "train" if (root / "train").is_dir() else root
    classes = _classes(train)
    images = _images(train, classes)
    drawn = set(random.Random(seed).sample(range(len(images)), min(calibration, len(images))))
    held, chosen = [image for i, image in enumerate(images) if i not in drawn], [images[i] for i in sorted(drawn)]
    learned = chosen
    if (root / "val").is_dir():
        held, learned = _images(root / "val", classes), images
    batches = Images(chosen, size, resize, batch_size)
    train = Images(learned, size, resize, batch_size, augmented=True)
    read = list(batches)
    evaluation = Images(held, size, resize, batch_size) if held else None
    return Data([x for x, _ in read], evaluation, train, [y for _, y in read])


@dataclass(frozen=True)
class Images:
    """Batches of images read when they are asked for. augmented: in random order, a random part of each, half of them
    mirrored; torch's random numbers decide."""

    files: list[tuple[Path, int]]
    size: int
    resize: int
    batch_size: int
    augmented: bool = False

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.files)).tolist() if self.augmented else range(len(self.files))
        for start in range(0, len(self.files), self.batch_size):
            part = [self.files[i] for i in order[start : start + self.batch_size]]
            yield torch.stack([self._read(path) for path, _ in part]), torch.tensor([label for _, label in part])

    def _read(self, path: Path) -> Tensor:
        import numpy as np

        image_module = _package("PIL.Image", "imagefolder")
        try:
            image = image_module.open(path).convert("RGB")
        except (OSError, ValueError) as error:
            raise fail("data", str(path), "a readable image", str(error)) from error
        scale = self.resize / min(image.size)
        width, height = (max(self.size, round(n * scale)) for n in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        if self.augmented:
            left, top = (int(torch.randint(2 * side + 1, ())) for side in (left, top))
            if torch.rand(()) < 0.5:
                image = image.transpose(image_module.Transpose.FLIP_LEFT_RIGHT)
        image = image.resize((width, height), image_module.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.size, top + self.size))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)


def _classes(folder: Path) -> list[str]:
    """Names of the folders with images, in order: the number of a class is its place."""
    found = sorted(d.name for d in folder.iterdir() if d.is_dir() and _images_in(d))
    if not found:
        raise fail("data", str(folder), "one folder per class with images in it", "no images")
    return found


def _images(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Images and the numbers of their classes, all of which must be among `classes`."""
    others = [name for name in _classes(folder) if name not in classes]
    if others:
        got = f"{', '.join(others[:8])}, which the images to calibrate and train on lack"
        raise fail("data", str(folder), f"the classes {', '.join(classes[:8])}{' ...' * (len(classes) > 8)}", got)
    return [(f, i) for i, name in enumerate(classes) for f in _images_in(folder / name)]


# --- parts ----------------------------------------------------------------------------------------------------------
def _digits(batch_size: int) -> Data:
    from qk.demo import digits

    data = digits.load()
    held_out = list(zip(data.test.split(batch_size), data.test_labels.split(batch_size), strict=True))
    calibration, labels = (list(x[:512].split(batch_size)) for x in (data.train, data.train_labels))
    return Data(calibration, held_out, digits.Augmented(data, batch_size), labels)


def _arguments(text: str) -> tuple[str, dict[str, Any]]:
    """ "name?a=1&b=x" -> name and {"a": 1, "b": "x"}."""
    name, _, options = text.partition("?")
    pairs = [option.partition("=") for option in options.split("&") if option]
    try:
        return name, {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise fail("arguments", repr(options), "name=value, joined by &", str(error).partition("\n")[0]) from error


def _made(source: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) with arguments that the user named."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise fail("model", source, "called with arguments that it takes, as NAME?key=value", error) from error


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "pillow" if name.startswith("PIL") else name
        raise fail(source, package, "installed", error, f"pip install {package}") from error


def _call(name: str, source: str) -> Any:
    module, _, function = name.partition(":")
    if not module or not function:
        raise fail("source", source, "python:MODULE:FUNCTION", repr(source))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # `qk` is a script: Python puts its folder there, not this one
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise fail("source", source, "a module and a function in it", str(error)) from error
    if not callable(found):
        raise fail("source", source, "a function", type(found).__name__)
    return found


def _transformer(path: str, source: str) -> nn.Module:
    transformers = _package("transformers", source)
    if not (Path(path) / "config.json").is_file():
        raise fail("model", source, "a folder with config.json and weights", "none there")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        names = [n for n in config.architectures or [] if hasattr(transformers, n)]
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        return kind.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise fail("model", source, "a model that transformers can load", str(error).splitlines()[0]) from error


def _unreadable(path: Path, error: Exception) -> QkError:
    advice = "Files with other objects in them are not opened: save model.state_dict()."
    kind = "a safetensors file or a torch file of tensors"
    return fail("weights", str(path), kind, str(error).splitlines()[0], advice)
