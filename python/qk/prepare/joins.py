"""Where a tensor is quantized once for all that read it: at the entry of the module in which layers and additions do.

In float by default: a layer quantizes what it reads, an addition takes the same tensor as it came. BRECQ's released
code quantizes it before either, so that what a shortcut hands on has the width of activations as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qk.prepare.observe import Observation, Operator, Value
from qk.prepare.prepared import Layer

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True)
class Join:
    """What runs around each call of a module: its first argument becomes the values that `readers`, layers inside that
    read it, quantize it to. readers: names from the module on.

    It holds no layer, so that it serves the prepared and the integer model, copies of both, and layers put in later.
    """

    readers: tuple[str, ...]

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A pre-hook. As long as no reader quantizes with a step of calibration, nothing changes."""
        found = self._readers(module)
        name = None if args else next(iter(kwargs), None)
        x = args[0] if args else kwargs.get(name)
        read = (layer.values_read(x) for layer in found if isinstance(x, Tensor))
        values = next((y for y in read if y is not None), None)
        if values is None:
            return None
        for layer in found:
            layer.arrived = values
        return ((values, *args[1:]), kwargs) if args else (args, kwargs | {name: values})

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A hook, also for calls that raise."""
        for layer in self._readers(module):
            layer.arrived = None

    def _readers(self, module: nn.Module) -> list[nn.Module]:
        """Those that are no float layers."""
        return [layer for name in self.readers if hasattr(layer := module.get_submodule(name), "values_read")]


def place(model: nn.Module, joins: dict[str, tuple[str, ...]]) -> None:
    """joins: module -> the names of readers, from it on."""
    for name, readers in joins.items():
        join, module = Join(readers), model.get_submodule(name)
        module.register_forward_pre_hook(join.enter, with_kwargs=True)
        module.register_forward_hook(join.leave, always_call=True)


def find_joins(seen: Observation, layers: dict[str, Layer]) -> dict[str, tuple[str, ...]]:
    """The innermost modules whose first argument a layer inside reads at every call, and an addition inside at one:
    module -> these layers' names from it on, in running order."""
    found: dict[str, tuple[str, ...]] = {}
    for name, calls in seen.calls.items():
        given = [call.inputs[0] for call in calls if call.single]
        if len(given) < len(calls) or not any(_adds(seen, value, name) for value in given):
            continue
        readers = [layer for layer in layers if layer != name and _reads(seen, layer, name, given)]
        if readers:
            found[name] = tuple(reader.removeprefix(f"{name}.") if name else reader for reader in readers)
    around = {outer for name in found for call in seen.calls[name] for outer in call.inside if _same(seen, outer, name)}
    return {name: readers for name, readers in found.items() if name not in around}


def _same(seen: Observation, outer: str, inner: str) -> bool:
    """Whether both take the same tensors, so that one of them is enough."""
    return {call.inputs[:1] for call in seen.calls[outer]} >= {call.inputs[:1] for call in seen.calls[inner]}


def _reads(seen: Observation, layer: str, module: str, given: list[Value]) -> bool:
    calls = [call for call in seen.calls[layer] if module in call.inside]
    return len(calls) == len(seen.calls[layer]) and [call.inputs[0] for call in calls] == given


def _adds(seen: Observation, value: Value, module: str) -> bool:
    """Whether an addition in `module` or inside reads the value without writing over it."""
    return any(
        operator.function in ADDITIONS and not _writes(operator, value) and _is_inside(seen, operator.module, module)
        for operator in seen.read[value]
    )


def _writes(operator: Operator, value: Value) -> bool:
    return operator.function is aten.add_.Tensor and operator.args[0] == value


def _is_inside(seen: Observation, name: str, module: str) -> bool:
    return name == module or any(module in call.inside for call in seen.calls.get(name, ()))


def working(model: nn.Module, joins: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The joins with a reader that quantizes the tensor itself with a step of calibration, be it switched on or not."""

    def works(name: str, readers: tuple[str, ...]) -> bool:
        module = model.get_submodule(name)
        return any(getattr(module.get_submodule(reader), "can_join", False) for reader in readers)

    return {name: readers for name, readers in joins.items() if works(name, readers)}
