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


def sort_modules(model: nn.Module, seen: Observation) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be quantized, in running order, and for every other module with weights the reason."""
    owners = Counter(_place(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    read_by: ReadBy = defaultdict(set)
    for value, readers in seen.readers.items():
        read_by[value.storage, value.offset].update(readers)
    layers: dict[str, Layer] = {}
    kept: dict[str, str] = {}
    started = {name: order for order, name in enumerate(seen.calls)}
    for name, module in sorted(model.named_modules(), key=lambda item: started.get(item[0], len(started))):
        holds_weights = any(p is not None for p in module._parameters.values())
        if not holds_weights and not isinstance(module, (nn.Conv2d, nn.Linear)):  # whose weight may be computed
            continue
        calls = seen.calls.get(name, [])
        reason = _against(module, name, calls, read_by, owners)
        if reason is None:
            layers[name] = _layer(name, module, len(layers), seen)
        else:
            kept[name] = reason
    return layers, kept


def _layer(name: str, module: nn.Module, order: int, seen: Observation) -> Layer:
    weight: Tensor = module.weight
    calls = seen.calls[name]
    for what, tensor in (("weight", weight), ("bias", module.bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            where = f"the {what} of {name or 'the model'}"
            raise fail(STAGE, where, "finite", "NaN or Inf in it", "Load the trained weights again.")
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


def _against(module: nn.Module, name: str, calls: list[Call], read_by: ReadBy, owners: Counter) -> str | None:
    """Why this module with weights stays in float; None if it can be quantized."""
    kind = type(module).__name__
    ran = bool(calls)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        what = f"{kind} holds parameters of its own, which have" if module._modules else f"{kind} has"
        return f"{what} no integer kernel" if ran else f"{kind} did not run on the example"
    if parametrize.is_parametrized(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed by a parametrization; remove that first"
    if _changes_forward(module):
        return f"{kind} has its own forward"
    if module.weight.numel() == 0:
        return "it has no weights"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    for what, p in (("weight", module.weight), ("bias", module.bias)):
        if p is not None and p.dtype != torch.float32:
            return f"its {what} is {_short(p.dtype)}, not float32"
    if owners[_place(module.weight)] > 1:
        return "its weight is shared with another module"
    if isinstance(module, nn.Conv2d) and (reason := _against_padding(module)):
        return reason
    others = sorted(read_by[_place(module.weight)] - {name})
    if others:
        return f"its weight is read by {', '.join(r or 'the model' for r in others)} without a call of the layer"
    if not ran:
        return "it did not run on the example"
    if has_hooks(module):
        return "it has hooks, which a replaced layer would lose"
    for call in calls:
        if len(call.inputs) != 1 or len(call.outputs) != 1:
            return "it was not called with one tensor to return one"
        if call.inputs[0].dtype != torch.float32:
            return f"its input is {_short(call.inputs[0].dtype)}, not float32"
        if isinstance(module, nn.Conv2d) and len(call.inputs[0].shape) != 4:
            return "its input has no batch axis"
    return None


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


def _place(p: Tensor) -> Place:
    """Where the values lie: equal for one Parameter in two modules and for two Parameters on the same memory."""
    return p.untyped_storage()._cdata, p.storage_offset()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
