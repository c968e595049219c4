"""Which modules can become integer layers, and why the others cannot: every module with weights gets an answer."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qk.errors import fail
from qk.prepare.observe import Call, Observation
from qk.prepare.prepared import Layer
from qk.prepare.source import STAGE
from qk.prepare.tree import has_hooks

Place = tuple[int, int]  # storage and offset
ReadBy = dict[Place, set[str]]  # -> the modules in which an operator read from there
SHARED = "its weight is shared with another module"
HOOKED = "it has hooks, which a replaced layer would lose"
COMPUTED = "its weight is computed by a parametrization; remove that first"
IDLE = "it did not run on the example"


def sort_modules(model: nn.Module, seen: Observation) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be quantized, in running order, and for every other module with weights the reason."""
    uses = Uses(model, seen)
    layers: dict[str, Layer] = {}
    kept: dict[str, str] = {}
    started = {name: order for order, name in enumerate(seen.calls)}
    for name, module in sorted(model.named_modules(), key=lambda item: started.get(item[0], len(started))):
        holds_weights = any(p is not None for p in module._parameters.values())
        if not holds_weights and not isinstance(module, (nn.Conv2d, nn.Linear)):  # whose weight may be computed
            continue
        calls = seen.calls.get(name, [])
        reason = _against(module, name, calls, uses)
        if reason is None:
            layers[name] = _layer(name, module, len(layers), seen)
        else:
            kept[name] = reason
    return layers, kept


class Uses:
    """Who holds and who reads each weight of a model."""

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self.owners = owners_of(model)
        self.read_by: ReadBy = defaultdict(set)
        for value, readers in seen.readers.items():
            self.read_by[value.storage, value.offset].update(readers)

    def is_shared(self, weight: Tensor) -> bool:
        """Whether several modules hold it, or several parameters lie on its memory."""
        return self.owners[place_of(weight)] > 1

    def by_others(self, weight: Tensor, name: str) -> str:
        """Why the weight of module `name` is needed outside of its calls; "" if it is not."""
        others = sorted(self.read_by[place_of(weight)] - {name})
        named = ", ".join(other or "the model" for other in others)
        return f"its weight is read by {named} without a call of the layer" if others else ""


def check_finite(name: str, **tensors: Tensor | None) -> None:
    """Raises QkError for a weight or bias of module `name` with a NaN or infinity."""
    for what, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            where = f"the {what} of {name or 'the model'}"
            raise fail(STAGE, where, "finite", "NaN or Inf in it", "Load the trained weights again.")


def _layer(name: str, module: nn.Module, order: int, seen: Observation) -> Layer:
    weight: Tensor = module.weight
    calls = seen.calls[name]
    check_finite(name, weight=weight, bias=module.bias)
    outputs = [call.outputs[0] for call in calls]
    return Layer(
        name=name,
        kind="conv2d" if isinstance(module, nn.Conv2d) else "linear",
        order=order,
        calls=len(calls),
        macs=sum(torch.Size(out.shape).numel() for out in outputs) * weight[0].numel(),
        weight_shape=tuple(weight.shape),
        input_shape=calls[0].inputs[0].shape,
        output_shape=outputs[0].shape,
        feeds=tuple(sorted(seen.feeds[name])),
    )


def _against(module: nn.Module, name: str, calls: list[Call], uses: Uses) -> str | None:
    """Why this module with weights stays in float; None if it can be quantized."""
    kind = type(module).__name__
    ran = bool(calls)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        what = f"{kind} holds parameters of its own, which have" if module._modules else f"{kind} has"
        return f"{what} no integer kernel" if ran else f"{kind} did not run on the example"
    if is_computed(module):
        return COMPUTED
    if _changes_forward(module):
        return f"{kind} has its own forward"
    if module.weight.numel() == 0:
        return "it has no weights"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    for what, p in (("weight", module.weight), ("bias", module.bias)):
        if p is not None and p.dtype != torch.float32:
            return f"its {what} is {_short(p.dtype)}, not float32"
    if uses.is_shared(module.weight):
        return SHARED
    if isinstance(module, nn.Conv2d) and (reason := _against_padding(module)):
        return reason
    if reason := uses.by_others(module.weight, name):
        return reason
    if not ran:
        return IDLE
    if has_hooks(module):
        return HOOKED
    for call in calls:
        if len(call.inputs) != 1 or len(call.outputs) != 1:
            return "it was not called with one tensor to return one"
        if call.inputs[0].dtype != torch.float32:
            return f"its input is {_short(call.inputs[0].dtype)}, not float32"
        if isinstance(module, nn.Conv2d) and len(call.inputs[0].shape) != 4:
            return "its input has no batch axis"
    return None


def is_computed(module: nn.Module) -> bool:
    """Whether its weight is no plain parameter."""
    return parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter)


def _changes_forward(module: nn.Module) -> bool:
    base = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    names = ("forward", "_conv_forward") if base is nn.Conv2d else ("forward",)
    return any(n in vars(module) or getattr(type(module), n) is not getattr(base, n) for n in names)


def _against_padding(layer: nn.Conv2d) -> str | None:
    if layer.padding_mode != "zeros":
        return f"padding_mode {layer.padding_mode!r} has no integer kernel"
    uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if layer.padding == "same" and uneven:
        return "padding 'same' of an even kernel is not symmetric"
    return None


def owners_of(model: nn.Module) -> Counter[Place]:
    """How many modules hold a parameter that lies there."""
    return Counter(place_of(p) for m in model.modules() for p in m._parameters.values() if p is not None)


def place_of(p: Tensor) -> Place:
    """Where the values lie: equal for one Parameter in two modules and for two Parameters on the same memory."""
    return p.untyped_storage()._cdata, p.storage_offset()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
