"""Where a tensor is quantized once for all that read it: at the entry of the module in which layers and additions do.

In float by default: a layer quantizes what it reads, an addition takes the same tensor as it came. BRECQ's released
code quantizes it before either, so that what a shortcut hands on has the width of activations as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qk.prepare.insert import QuantLayer
from qk.prepare.observe import Observation, Operator, Value, first_name
from qk.prepare.prepared import Layer

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True)
class Join:
    """What runs around each call of a module: its first argument becomes the values that `readers`, layers inside that
    read it, quantize it to. readers: names from the module on. argument: the name of the first one.

    It holds no layer, so that it serves the prepared and the integer model, copies of both, and layers put in later.
    """

    readers: tuple[str, ...]
    argument: str | None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A pre-hook. As long as no reader quantizes with a step of calibration, nothing changes."""
        x = args[0] if args else kwargs.get(self.argument)
        found = self._joining(module)
        if not isinstance(x, Tensor) or any(isinstance(n, QuantLayer) and x is n.arrived for n in found):
            return None  # a module around this one has done it
        values = None
        for layer in found:
            values = layer.values_read(x) if values is None else values
        if values is None:
            return None
        for layer in found:
            if isinstance(layer, QuantLayer):
                layer.arrived, layer.arrived_in = values, id(module)
        given = tuple([values if argument is x else argument for argument in args])
        return given, {name: values if argument is x else argument for name, argument in kwargs.items()}

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A hook, also for calls that raise."""
        for layer in self._joining(module):
            if isinstance(layer, QuantLayer) and layer.arrived_in == id(module):
                layer.arrived, layer.arrived_in = None, 0

    def _joining(self, module: nn.Module) -> list[Any]:
        """The readers that quantize the tensor itself, with a step of calibration."""
        found = [module.get_submodule(name) for name in self.readers]
        return [layer for layer in found if getattr(layer, "can_join", False)]


def place(model: nn.Module, joins: dict[str, tuple[str, ...]]) -> None:
    """joins: module -> the names of readers, from it on."""
    for name, readers in joins.items():
        module = model.get_submodule(name)
        join = Join(readers, first_name(module))
        module.register_forward_pre_hook(join.enter, with_kwargs=True)
        module.register_forward_hook(join.leave, always_call=True)


def working(model: nn.Module, joins: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The joins with a reader that quantizes the tensor itself with a step of calibration, be it switched on or not."""
    return {name: readers for name, readers in joins.items() if Join(readers, None)._joining(model.get_submodule(name))}


def find_joins(model: nn.Module, seen: Observation, layers: dict[str, Layer]) -> dict[str, tuple[str, ...]]:
    """For each addition the innermost module around it whose first argument it reads, and a layer inside too, at every
    call: module -> these layers' names from it on, in running order."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[str, tuple[str, ...]] = {}
    for value, operators in seen.read.items():
        for operator in operators:
            if operator.function not in ADDITIONS or not _adds(operator, value, owned):
                continue
            for name in reversed(operator.inside):
                if value in _given(seen, name) and (readers := _readers(model, seen, layers, name)):
                    found[name] = readers
                    break
    return {name: found[name] for name in seen.calls if name in found}


def _adds(operator: Operator, value: Value, owned: set[int]) -> bool:
    """Whether it adds another activation to the value, and does not write over it."""
    both = operator.args[:2]
    is_sum = len(both) == 2 and all(isinstance(x, Value) and x.storage not in owned for x in both)
    return is_sum and not (operator.function is aten.add_.Tensor and both[0] == value)


def _given(seen: Observation, name: str) -> list[Value | None]:
    return [call.first for call in seen.calls[name]]


def _readers(model: nn.Module, seen: Observation, layers: dict[str, Layer], name: str) -> tuple[str, ...]:
    """The layers inside that read the first argument of each call of the module; none if an operator inside writes
    over it, as the caller would not see that."""
    given = _given(seen, name)
    if any(value is None or name in seen.written.get((value.storage, value.version), ()) for value in given):
        return ()
    module = model.get_submodule(name)
    names = {id(inner): inside for inside, inner in module.named_modules() if inner is not module}
    found = []
    for layer in layers:
        inside = names.get(id(model.get_submodule(layer)))
        calls = seen.calls[layer]
        if inside and all(name in call.inside for call in calls) and [call.inputs[0] for call in calls] == given:
            found.append(inside)
    return tuple(found)
