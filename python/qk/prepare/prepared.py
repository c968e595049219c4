"""What prepare found in a model, and the model with quantizers in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qk.errors import fail
from qk.options import Embeddings
from qk.prepare.insert import QuantLayer
from qk.prepare.lookup import QuantTable
from qk.spec import Plan


@dataclass(frozen=True)
class Layer:
    """A Conv2d or Linear that can be quantized, as it was seen to run on the example.

    name: module path. order: place among all layers by first call. macs: multiply-accumulates for the whole example.
    input_shape, output_shape: of the first call, batch first. feeds: the layers that read what the model makes of its
    output; none of a last layer, of which a detector has several.
    """

    name: str
    kind: str  # "conv2d" | "linear"
    order: int
    calls: int
    macs: int
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """What is reconstructed together: a block (residual unit, transformer layer), or one layer that is in no block.

    name: module path of the module whose input and output are matched. layers: those inside, in running order. chain:
    where no one module is all of it, the modules that hand their output to the next: those of a stage, or a layer and
    its activation function.
    """

    name: str
    layers: tuple[str, ...]
    chain: tuple[str, ...] = ()

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """What runs, one after another: the first takes the unit's input, the last gives its output."""
        return [model.get_submodule(name) for name in self.chain or (self.name,)]

    def module(self, model: nn.Module) -> nn.Module:
        """All of it as one module."""
        modules = self.modules(model)
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


@dataclass(frozen=True)
class Path:
    """Channels that can be scaled: row i of the weight and bias of `source` (a layer, or a norm with weights) divided
    by s_i > 0, and what `readers` multiply with it multiplied by s_i, change nothing (qk.prepare.paths).

    channels: of the source. readers: layer -> for each of its input channels the source's. clips: ReLU6 modules in
    between, for which this holds only where nothing is clipped.
    """

    source: str
    channels: int
    readers: dict[str, Tensor]
    clips: tuple[str, ...] = ()


@dataclass
class Prepared:
    """A copy of the model, BatchNorm folded, with a QuantLayer at every layer of the plan that is not float, and a
    QuantTable at every embedding table that is quantized.

    layers: every quantizable layer that ran, in running order. units: in running order; together they hold every
    quantized layer once. links: groups of layers that read the same tensor; they share one activation width and one
    quantizer, but dynamic layers do not share it with others. folds: BatchNorm name -> the layer it was folded into.
    kept: module with weights -> why it stays in float, be it that no kernel runs it or that the plan says so; "" is the
    model itself. stages: the units with successive blocks at one resolution put together. all_units, all_stages: as
    they would be if no layer stayed in float. alone: each layer as a unit of its own. originals: the float modules,
    folded, that QuantLayers stand for. learned_in: the run that the learning so far is of (qk.methods.resume). paths:
    along which channels can be scaled; blocked: every other layer or norm -> why not there. unclipped: ReLU6 modules
    that became ReLU. tables: name of an embedding table to quantize -> how. joins: module at whose entry a tensor is
    quantized for all that read it -> the layers inside that do, by their names from it on (qk.prepare.joins).
    contiguous: convolutions of whose outputs the model asks views that channels_last has not (qk.prepare.layouts).
    """

    model: nn.Module
    layers: dict[str, Layer]
    units: list[Unit]
    links: list[tuple[str, ...]]
    folds: dict[str, str]
    kept: dict[str, str]
    plan: Plan
    stages: list[Unit] = field(default_factory=list)
    all_units: list[Unit] = field(default_factory=list)
    alone: dict[str, Unit] = field(default_factory=dict, repr=False)
    all_stages: list[Unit] = field(default_factory=list)
    originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    calibrated: bool = False  # every step is set
    history: dict[str, list[dict]] = field(default_factory=dict)  # unit name -> [{"iteration", "loss"}], for the report
    learned_in: dict[str, Any] = field(default_factory=dict, repr=False)
    paths: list[Path] = field(default_factory=list, repr=False)
    blocked: dict[str, str] = field(default_factory=dict, repr=False)
    unclipped: list[str] = field(default_factory=list)
    tables: dict[str, Embeddings] = field(default_factory=dict)
    joins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contiguous: set[str] = field(default_factory=set)
    search: object = None  # qk.calibrate.lapq.Found: what lapq saw

    @property
    def blocks(self) -> list[Unit]:
        """The units that hold more than one layer."""
        return [u for u in self.units if len(u.layers) > 1]

    def quant_layers(self) -> dict[str, QuantLayer]:
        """Name -> QuantLayer, in running order; float layers are not in it."""
        found = {name: self.model.get_submodule(name) for name in self.layers}
        return {name: module for name, module in found.items() if isinstance(module, QuantLayer)}

    def quant_tables(self) -> dict[str, QuantTable]:
        """Name -> QuantTable, in running order."""
        return {name: self.model.get_submodule(name) for name in self.tables}

    @contextmanager
    def quantized(self, names: set[str] | None = None) -> Iterator[nn.Module]:
        """The model with the named layers and tables quantized (all by default) and every other one in float, for a
        while."""
        layers = {**self.quant_tables(), **self.quant_layers()}
        before = {name: layer.quantized for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.quantized = names is None or name in names
        try:
            yield self.model
        finally:
            for name, layer in layers.items():
                layer.quantized = before[name]


@contextmanager
def float_activations(p: Prepared) -> Iterator[None]:
    """Quantized layers take their inputs in float, for a while."""
    quantizers = {layer.input for layer in p.quant_layers().values()}
    for quantizer in quantizers:
        quantizer.passes = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.passes = False


def check_prepared(p: object, stage: str) -> None:
    """Raises QkError for what qk.prepare did not return, such as the float model itself."""
    if not isinstance(p, Prepared):
        raise fail(stage, "p", "the result of qk.prepare", type(p).__name__, "Call qk.prepare(model, example) first.")


def check_calibrated(p: object, stage: str) -> None:
    """Raises QkError as check_prepared does, and for a Prepared without steps."""
    check_prepared(p, stage)
    if not p.calibrated:
        raise fail(stage, "p", "calibrated", "one that is not", "Call qk.calibrate(p, batches) first.")


def check_learnable(p: object, stage: str) -> None:
    """Raises QkError as check_calibrated does, and for weights on a grid that nothing that learns can round to."""
    check_calibrated(p, stage)
    rising = [name for name, layer in p.quant_layers().items() if layer.spec.grid == "mid-rise"]
    if rising:
        got = f"mid-rise in {', '.join(rising[:5])}"
        raise fail(stage, "grid", "mid-tread where codes are learned", got, "Prepare again without it.")
