"""Units of reconstruction: which modules are blocks (residual units, transformer layers), by repetition, not by name.

A block is a module whose class the model uses at least twice, that holds at least two layers, is no plain container,
runs once, takes a tensor and returns one. The outermost such module counts, unless it is a stage: it holds two blocks
of one class, and one hands its output to the other. (The two attentions of a decoder layer do not: a sum and a norm are
between.) That a residual unit is the right size: Li et al., BRECQ (2021).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from qk.errors import fail
from qk.prepare.observe import Observation
from qk.prepare.prepared import Layer, Unit
from qk.prepare.source import STAGE
from qk.spec import Plan

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh),
)


def find_alone(model: nn.Module, seen: Observation, layers: dict[str, Layer], folds: dict[str, str]) -> dict[str, Unit]:
    """Each layer as a unit of its own, with the activation function that alone reads its output, where that is a module
    whose first call it is: what is cut off there need not be matched. folds: BatchNorm -> layer."""
    norms = {layer: norm for norm, layer in folds.items()}
    reading = {
        seen.calls[name][0].first: name
        for name, module in model.named_modules()
        if name in seen.calls and isinstance(module, ACTIVATIONS)
    }
    alone = {}
    for layer in layers:
        output = seen.calls[norms.get(layer, layer)][0].outputs[0]
        reader = reading.get(output)
        is_only = set(seen.readers.get(output, ())) == {reader} and output not in seen.results
        alone[layer] = Unit(layer, (layer,), (layer, reader) if reader and is_only else ())
    return alone


def find_units(
    model: nn.Module,
    seen: Observation,
    layers: dict[str, Layer],
    alone: dict[str, Unit],
    names: Sequence[str] | None = None,
) -> list[Unit]:
    """Units in running order that hold every layer once. alone: of find_alone. names: the blocks, instead of those
    found."""
    held = layers_inside(seen, layers)
    blocks = found_blocks(model, seen, held) if names is None else _checked(model, seen, held, names)
    block_of = {layer: block for block in blocks for layer in held[block]}
    members: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        members[block_of.get(layer, layer)].append(layer)
    return [alone.get(name) or Unit(name, tuple(inside)) for name, inside in members.items()]


def find_stages(seen: Observation, layers: dict[str, Layer], units: list[Unit]) -> list[Unit]:
    """The units, but blocks of which one reads the output of the one before, and whose outputs have one resolution,
    together: a stage as in Li et al., BRECQ (2021)."""
    held = layers_inside(seen, layers)
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and _goes_on(seen, runs[-1][-1], unit):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return [stage for run in runs for stage in _together(seen, held, run)]


def _goes_on(seen: Observation, before: Unit, unit: Unit) -> bool:
    if len(before.layers) < 2 or len(unit.layers) < 2:
        return False
    first, second = seen.calls[before.name][0], seen.calls[unit.name][0]
    same_size = _resolution(first.outputs[0].shape) == _resolution(second.outputs[0].shape)
    return same_size and second.inputs[0] == first.outputs[0]


def _resolution(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[B, C, H, W] has its channels second, everything else last."""
    return shape[2:] if len(shape) == 4 else shape[1:-1]


def _together(seen: Observation, held: dict[str, list[str]], run: list[Unit]) -> list[Unit]:
    """One unit: the module that holds the blocks and nothing else, or a chain of them. Blocks that take more than one
    tensor and have no such module stay apart."""
    if len(run) == 1:
        return run
    layers = tuple(layer for unit in run for layer in unit.layers)
    first, last = seen.calls[run[0].name][0], seen.calls[run[-1].name][0]
    for name in reversed(first.inside):
        call = seen.calls[name][0]
        ends_fit = first.first is not None and call.first == first.first and call.outputs[:1] == last.outputs[:1]
        if tuple(held.get(name, ())) == layers and ends_fit:
            return [Unit(name, layers)]
    if all(len(seen.calls[unit.name][0].inputs) == 1 for unit in run):
        return [Unit(f"{run[0].name} to {run[-1].name}", layers, tuple(unit.name for unit in run))]
    return run


def quantized_units(units: list[Unit], plan: Plan) -> list[Unit]:
    """The units without their float layers; without units that would be empty."""
    kept = [replace(u, layers=tuple(n for n in u.layers if not plan[n].is_float)) for u in units]
    return [u for u in kept if u.layers]


def layers_inside(seen: Observation, layers: dict[str, Layer]) -> dict[str, list[str]]:
    """Module that runs once -> the layers all of whose calls are its own or inside its call."""
    held: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        around = set.intersection(*({*call.inside, layer} for call in seen.calls[layer]))
        for name in around:
            if len(seen.calls[name]) == 1:
                held[name].append(layer)
    return held


def found_blocks(model: nn.Module, seen: Observation, held: dict[str, list[str]]) -> list[str]:
    """Names of the blocks, as the page above says, in running order. held: of layers_inside."""
    kind = {name: type(module) for name, module in model.named_modules()}
    instances = Counter(kind.values())
    candidates = [
        name
        for name in seen.calls
        if instances[kind[name]] >= 2
        and len(held.get(name, ())) >= 2
        and not issubclass(kind[name], CONTAINERS)
        and seen.calls[name][0].single
    ]
    call = {name: seen.calls[name][0] for name in candidates}

    def is_stage(outer: str) -> bool:
        inner = [name for name in candidates if outer in call[name].inside]
        given = {(kind[name], value) for name in inner for value in call[name].outputs}
        return any((kind[name], call[name].inputs[0]) in given for name in inner)

    blocks = [name for name in candidates if not is_stage(name)]
    return [name for name in blocks if not set(call[name].inside) & set(blocks)]


def _checked(model: nn.Module, seen: Observation, held: dict[str, list[str]], names: Sequence[str]) -> list[str]:
    """The names as given, if each can be reconstructed on its own."""
    if isinstance(names, str):
        raise fail(STAGE, "blocks", "a list of names", repr(names))
    known = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise fail(STAGE, "blocks", "names of modules", repr(name), "See dict(model.named_modules()).")
        calls = seen.calls.get(name, [])
        if len(calls) != 1 or not calls[0].single:
            what = f"{name!r}, which ran {len(calls)} times" if len(calls) != 1 else f"{name!r}, which does not"
            raise fail(STAGE, "blocks", "modules that run once, take a tensor and return one", what)
        if not held.get(name):
            raise fail(STAGE, "blocks", "modules that hold layers to quantize", repr(name))
        nested = set(calls[0].inside) & set(names)
        if nested:
            raise fail(STAGE, "blocks", "apart from each other", f"{name!r} inside {min(nested)!r}")
    return list(names)
