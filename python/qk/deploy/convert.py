"""convert: from the prepared, calibrated model to one with integer layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops
from qk.deploy.embedding import to_integer_table
from qk.deploy.modules import IntegerLayer, QConv2d, QLinear
from qk.errors import fail
from qk.inputs import digest
from qk.prepare import joins
from qk.prepare.insert import QuantLayer, from_kernel_order
from qk.prepare.lookup import QuantTable
from qk.prepare.points import add_to_owners
from qk.prepare.prepared import Prepared, check_prepared
from qk.spec import Plan


@dataclass(frozen=True)
class Info:
    """What is known about an integer model: it is `qk_info` of the model and lies in its checkpoint.

    plan, links, folds, kept: as in Prepared. history: unit name -> first and last loss and iterations of
    reconstruction. fingerprint: of the float weights, BatchNorm folded, that were quantized. new_biases: layers that
    have none in float, and were given one (qk.correct_bias). unclipped: ReLU6 modules that became ReLU (qk.unclip).
    joins: as in Prepared, those that work.
    """

    plan: Plan
    links: list[tuple[str, ...]] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    history: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprint: str = ""
    new_biases: list[str] = field(default_factory=list)
    unclipped: list[str] = field(default_factory=list)
    joins: dict[str, tuple[str, ...]] = field(default_factory=dict)


def convert(p: Prepared) -> nn.Module:
    """A copy of the prepared model with integer layers and tables where it has quantized ones; p stays as it is.

    The result is in eval mode and has `qk_info` (Info). Layers that the plan leaves in float stay float.
    Raises QkError when p is not calibrated, a layer's rounding is still being learned, or nothing is quantized.
    """
    check_prepared(p, "qk.convert")
    layers = p.quant_layers()
    if not layers and not p.tables:
        raise fail("qk.convert", "p", "a model with a quantized layer", f"{len(p.kept)} layers, all float")
    if not p.calibrated:
        raise fail("qk.convert", "p", "calibrated", "no ranges", "Call qk.calibrate(p, batches) first.")
    integer: dict[int, nn.Module] = {id(layer): to_integer(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():  # all, where one that stays in float has to be: it lies as its input does
        if layer.conv_args is not None and (name in p.contiguous or p.contiguous - layers.keys()):
            integer[id(layer)].contiguous = True
    integer |= {id(table): to_integer_table(table) for table in p.quant_tables().values()}
    scales: dict[int, Tensor] = {}  # layers that read one tensor still share the factors on it
    for layer in layers.values():
        if layer.input_scale is not None:
            integer[id(layer)].input_scale = scales.setdefault(id(layer.input_scale), layer.input_scale.clone())
    # deepcopy takes what its memo holds for an object, so every place that holds a layer gets the same integer one.
    model = copy.deepcopy(p.model, dict(integer))
    model.eval()
    model.qk_info = Info(
        plan=p.plan,
        links=[tuple(link) for link in p.links],
        folds=dict(p.folds),
        kept=dict(p.kept),
        history={unit: _summary(steps) for unit, steps in p.history.items() if steps},
        fingerprint=fingerprint(p.model),
        new_biases=[name for name, layer in layers.items() if layer.bias is None and layer.quantized_bias is not None],
        unclipped=list(p.unclipped),
        joins=joins.working(p.model, p.joins),
    )
    return model


def to_integer(name: str, layer: QuantLayer) -> IntegerLayer:
    """The integer layer that computes what `layer` simulates. Raises QkError when it would not."""
    where = f"layer {name or type(layer).__name__}"
    for what, tensor in (*layer.named_parameters(), ("bias", layer.quantized_bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise fail("qk.convert", f"{what} of {where}", "float32", tensor.dtype, "Call .float() on the model first.")
        if tensor is not None and not torch.isfinite(tensor).all():
            got = "NaN or infinity, which have codes like any other value"
            raise fail("qk.convert", f"{what} of {where}", "finite", got, "Training may have diverged: lower its rate.")
    codes, step, zero = layer.integers()
    if codes is None or not layer.input.calibrated:
        raise fail("qk.convert", where, "calibrated", "no range", "Call qk.calibrate(p, batches) first.")
    if layer.rounding is not None:
        raise fail("qk.convert", where, "done with learning", "an unfinished rounding", "Let qk.reconstruct finish.")
    n, k = codes.shape[0], codes[0].numel()
    tensors = {
        "packed": ops.pack(codes.reshape(n, k), layer.spec.storage_bits),
        "weight_step": step.detach().clone(),
        "weight_zero": zero.clone(),
        "bias": None if layer.quantized_bias is None else layer.quantized_bias.detach().to(torch.float32, copy=True),
        "input_scale": None if layer.input_scale is None else layer.input_scale.clone(),
    }
    if not layer.spec.dynamic:
        tensors |= {"input_step": layer.input.step.detach().clone(), "input_zero": layer.input.zero.clone()}
    if layer.tail_owners is not None:
        rows = layer.tail_codes.reshape(-1, k)
        tensors |= {"tail_packed": ops.pack(rows, layer.spec.storage_bits), "tail_step": layer.tail_step.clone()}
        tensors["tail_owners"] = layer.tail_owners.clone()
    kind = QLinear if layer.conv_args is None else QConv2d
    module = kind(tensors, layer.spec, tuple(codes.shape), **(layer.conv_args or {}))
    deployed = from_kernel_order(deployed_weight(module))
    if not torch.equal(deployed, layer.quantized_weight()):
        moved = int((deployed != layer.quantized_weight()).sum())
        raise fail("qk.convert", where, "equal to its simulated weight", f"{moved} values that differ")
    return module


def deployed_weight(module: IntegerLayer) -> Tensor:
    """The weight that the integer layer stands for, in kernel order: float32, points of a channel summed in order."""
    weight = ops.dequantize(module.weight_codes(), module.weight_step, module.weight_zero)
    if module.tail_owners is None:
        return weight
    zeros = module.weight_zero[module.tail_owners]
    return add_to_owners(weight, ops.dequantize(module.tail_codes(), module.tail_step, zeros), module.tail_owners)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, types, shapes and contents of a prepared model's float tensors."""
    found = model.named_modules(remove_duplicate=False)
    prefixes = tuple(
        f"{name}." if name else "" for name, module in found if isinstance(module, QuantLayer | QuantTable)
    )
    own = {prefix + name for prefix in prefixes for name in ("weight", "bias")}
    state = sorted(model.state_dict().items())
    return digest((name, tensor) for name, tensor in state if name in own or not name.startswith(prefixes))


def _summary(steps: list[dict]) -> dict[str, Any]:
    losses = [step["loss"] if isfinite(step["loss"]) else None for step in steps]
    return {"iterations": steps[-1]["iteration"], "first_loss": losses[0], "last_loss": losses[-1]}
