"""Whole networks: in float, quantized by qk as it is and fused, and the files that peers make of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qk import deploy, sources
from qk.bench.rows import Candidate, same_bits
from qk.calibrate import calibrate
from qk.deploy import manifest
from qk.deploy.modules import integer_layers
from qk.errors import QkError, fail
from qk.prepare import prepare
from qk.spec import QuantSpec, Recipe

MINILM = "minilm"  # the shape of all-MiniLM-L6-v2 with random weights: nothing to download
TORCHVISION = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v2")
DEFAULT = (*TORCHVISION, MINILM)
WIDTHS = ("W8A8", "W4A8", "W4A6")
IMAGE, TOKENS = 224, 128
INT8_ERROR = 0.4  # root mean square of the error over that of the result: calibrated on one random batch


class Network:
    """A network and one batch of inputs. size: of a square image, or of a text in tokens."""

    def __init__(self, source: str, batch: int, size: int | None = None):
        self.source, self.batch = source, batch
        self.is_transformer = source == MINILM or source.startswith("hf:")
        self.size = size or (TOKENS if self.is_transformer else IMAGE)

    @property
    def name(self) -> str:
        return self.source.partition(":")[2].rstrip("/").rpartition("/")[2] or self.source

    @property
    def key(self) -> str:
        """Of files in the cache: same source, same batch, same file."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:8]
        return f"{self.name.partition('?')[0]}-{digest}-b{self.batch}-{self.size}"

    @cached_property
    def model(self) -> nn.Module:
        """Float32, in eval mode, with weights of a fixed seed where the source has none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.is_transformer:
                with contextlib.suppress(QkError):
                    sources.import_torchvision()  # transformers imports it where it is installed
            if self.source == MINILM:
                return _LastHidden(_minilm()).eval()
            model = sources.load_model(self.source)
            if self.is_transformer:
                return _LastHidden(model).eval()
            _spread_statistics(model)
        return model.eval().to(memory_format=torch.channels_last)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(1)
        if self.is_transformer:
            ids = torch.randint(1000, 20000, (self.batch, self.size), generator=rng)
            return ids, torch.ones_like(ids)
        return (torch.randn(self.batch, 3, self.size, self.size, generator=rng),)

    @cached_property
    def expected(self) -> Tensor:
        return self.run(self.model)

    def run(self, model: nn.Module | Callable) -> Tensor:
        with torch.inference_mode():
            return model(*self.inputs)

    def copy(self, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(self.model).to(dtype)

    @property
    def int8_error(self) -> float:
        return INT8_ERROR

    def close(self, got: Tensor, tolerance: float, expected: Tensor | None = None) -> None:
        """The root mean square of the error is at most `tolerance` of that of the result around its mean."""
        expected = self.expected if expected is None else expected
        assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
        error = float((got - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12))
        assert error <= tolerance, f"an error of {error:.3g} of the result, {tolerance:g} are allowed"


def folder_of(net: Network, widths: str, cache: Path) -> Path:
    """Of the checkpoint: one for all batches, for the steps do not depend on the batch that is timed."""
    return cache / f"{Network(net.source, 1, net.size).key}-{widths}-qk"


def quantized(net: Network, widths: str, cache: Path) -> nn.Module:
    """With integer layers, from the cache or made now: steps from one batch, rounding to nearest."""
    first, folder = Network(net.source, 1, net.size), folder_of(net, widths, cache)
    if (folder / manifest.FILE).is_file():
        try:
            return deploy.load(folder, model=first.model)
        except QkError:
            pass  # of another version: made again
    weights, activations = (int(part) for part in widths[1:].split("A"))
    recipe = Recipe(weights=weights, activations=activations, method="nearest", ranges="minmax")
    prepared = prepare(first.model, first.inputs, recipe)
    calibrate(prepared, [first.inputs], ranges="minmax")
    model = deploy.convert(prepared)
    cache.mkdir(parents=True, exist_ok=True)
    deploy.save(model, folder)
    return model


def ours(net: Network, widths: Iterable[str], cache: Path, modules: bool = True) -> Iterable[Candidate]:
    """Fused, and as integer modules: all of them with `modules`, else the first width."""
    for i, name in enumerate(widths):
        model = quantized(net, name, cache)
        if modules or i == 0:
            yield _candidate(net, f"qk {name} modules", f"{name} modules", model, None)
        if hasattr(deploy, "fuse"):
            yield _candidate(net, f"qk {name}", name, *_fused(net.source, net.size, name, cache))


@lru_cache(maxsize=2 * len(WIDTHS))  # for the next batch size
def _fused(source: str, size: int, widths: str, cache: Path) -> tuple[nn.Module, nn.Module]:
    """The fused network, and the graph of single operators that it must equal bit for bit."""
    first = Network(source, 1, size)
    model = quantized(first, widths, cache)
    return deploy.fuse(model, first.inputs), deploy.unfused(model, first.inputs)


def _candidate(net: Network, name: str, family: str, model: Any, definition: nn.Module | None) -> Candidate:
    """definition: what the model must equal bit for bit."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model(*net.inputs)

    def check() -> None:
        got = run()
        if definition is not None:
            same_bits(got, net.run(definition))
        if "W8A8" in name:
            net.close(got, INT8_ERROR)
        else:
            assert got.isfinite().all(), "the result is not finite"  # too few bits to be close without learning

    return Candidate(name, family, run, check)


def start(source: str, widths: str, cache: Path) -> Iterable[Candidate]:
    """Loading a checkpoint, with the packing of its weights for the kernels."""
    net = Network(source, 1)
    model = quantized(net, widths, cache)
    folder = folder_of(net, widths, cache)

    def check() -> None:
        loaded = deploy.load(folder, model=net.model)
        assert torch.equal(net.run(loaded), net.run(model)), "the loaded network computes something else"

    layers = integer_layers(model).values()
    sizes = {"packed": sum(x.packed.nbytes for x in layers), "prepacked": sum(x.prepacked.nbytes for x in layers)}
    yield Candidate(f"qk load {widths}", "load", lambda: deploy.load(folder, model=net.model), check, facts=sizes)


def parse_widths(text: str) -> list[str]:
    """W8A8,W4A6 as a list. Raises QkError for what no recipe can ask for."""
    found = [part.strip().upper() for part in text.split(",") if part.strip()]
    for name in found:
        weights, a, activations = name[1:].partition("A")
        if name[:1] != "W" or not a or not weights.isdigit() or not activations.isdigit():
            raise fail("bench", "--widths", "such as W4A8,W4A6", repr(text))
        QuantSpec(weights=int(weights), activations=int(activations))
    if not found:
        raise fail("bench", "--widths", "such as W4A8,W4A6", repr(text))
    return found


class _LastHidden(nn.Module):
    """A transformer with plain inputs and one tensor as its result, as exporters want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def _minilm() -> nn.Module:
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise fail("bench", MINILM, "with transformers installed", str(error), "pip install transformers.") from error
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False)


def _spread_statistics(model: nn.Module) -> None:
    """A network with random weights, whose values would die out or explode on the way, keeps their scale."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1)
            elif isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.0)
                module.bias.uniform_(-0.1, 0.1)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2.0)
