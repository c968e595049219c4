"""Folds a BatchNorm into the layer in front of it: what it does in eval mode is a scale and a shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qk.prepare.observe import Observation, Value
from qk.prepare.prepared import Layer
from qk.prepare.tree import has_hooks, replace_module


def fold_batchnorms(
    model: nn.Module, seen: Observation, layers: dict[str, Layer]
) -> tuple[dict[str, str], dict[str, str]]:
    """Folds in place; a folded norm becomes nn.Identity. Returns norm -> layer, and norm -> why it was not folded."""
    made_by = {seen.calls[name][0].outputs[0]: layer for name, layer in layers.items() if layer.calls == 1}
    folds: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, norm in list(model.named_modules()):
        if not isinstance(norm, _BatchNorm) or name not in seen.calls:
            continue
        layer = made_by.get(seen.calls[name][0].inputs[0])
        reason = _against(name, norm, layer, seen)
        if reason is None:
            target = model.get_submodule(layer.name)
            weight, bias = folded(target.weight, target.bias, norm)
            if torch.isfinite(weight).all() and torch.isfinite(bias).all():
                target.weight = nn.Parameter(weight, target.weight.requires_grad)
                target.bias = nn.Parameter(bias, target.weight.requires_grad)
                replace_module(model, norm, nn.Identity().eval())
                norm.forward = nn.Identity().forward  # for a model that reaches it on another way than its name
                folds[name] = layer.name
                continue
            reason = "its statistics do not fold into finite weights"
        kept[name] = f"{type(norm).__name__} was not folded: {reason}"
    return folds, kept


def folded(weight: Tensor, bias: Tensor | None, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does norm(layer(x)): w * gamma / sqrt(var + eps), (b - mean) * the same + beta.

    Computed in float64 and rounded once.
    """
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        rows = scale.reshape(-1, *[1] * (weight.dim() - 1))
        return (weight.double() * rows).to(weight.dtype), shift.to(weight.dtype)


def _against(name: str, norm: _BatchNorm, layer: Layer | None, seen: Observation) -> str | None:
    if len(seen.calls[name]) != 1:
        return "it runs more than once"
    if type(norm).forward is not _BatchNorm.forward or "forward" in vars(norm):
        return "it has its own forward"
    if norm.running_mean is None or norm.running_var is None or norm.training:
        return "it has no running statistics"
    if layer is None:
        return "its input is not the output of one layer that runs once"
    if layer.kind == "linear" and len(layer.output_shape) != 2:
        return "its channels are not the layer's last axis"
    if has_hooks(norm):
        return "it has hooks, which would be lost"
    read: Value = seen.calls[name][0].inputs[0]
    if set(seen.readers[read]) != {name} or read in seen.results:
        return f"the output of {layer.name} is read elsewhere too"
    return None
