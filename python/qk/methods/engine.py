"""What every method of reconstruction shares: the data of a unit, Fisher weights, the loss, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qk import ops
from qk.calibrate.batches import MASK, Stop, call, counting
from qk.calibrate.objective import first_tensor, task_loss
from qk.errors import fail
from qk.inputs import device_of
from qk.methods.cache import Cache, Call, Room, Sample
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Prepared, Unit

STAGE = "qk.reconstruct"


def units_of(p: Prepared, granularity: str) -> list[Unit]:
    """What is reconstructed together, in running order."""
    layers = tuple(p.quant_layers())
    if granularity == "layer":
        return [p.alone[name] for name in layers]
    return {"block": p.units, "stage": p.stages, "net": [Unit("", layers)] if layers else []}[granularity]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gathers a gradient, and the model is in eval mode, for a while."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_(True)


# --- the data of a unit ----------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_cache(
    p: Prepared,
    unit: Unit,
    prefix: set[str],
    batches: list,
    room: Room,
    outputs: list[Tensor] | None = None,
    mixed: bool = True,
) -> Cache:
    """Inputs from the prefix quantized and from the float model, outputs of the float model; with `outputs`, the float
    model's own for each batch, also Fisher weights. Padding has the weight 0. mixed: False leaves the float inputs out.

    Raises QkError for a batch on which the unit's output is not finite.
    """
    cache = Cache(room, device_of(p.model))
    padded = any(MASK in batch for batch in batches if isinstance(batch, Mapping))
    for index, batch in enumerate(batches):
        with p.quantized(set()):
            plain, target = watch(p, unit, batch, index)
        if not torch.isfinite(target).all():
            where = f"batch {index}, where it leaves {unit.name or 'the model'} in float,"
            raise fail(STAGE, where, "finite", "NaN or infinity", "Look for it in the batch, then in the model.")
        with p.quantized(prefix):
            quantized = watch(p, unit, batch, index, inputs_only=True)[0] if prefix else plain
        weight = None
        if outputs is not None:
            with p.quantized(prefix | set(unit.layers)):
                weight = fisher(p, unit.modules(p.model)[-1], batch, index, outputs[index])
        if padded:
            weight = torch.ones_like(target) if weight is None else weight
            if (counted := counting(batch, target)) is not None:
                weight = weight * counted[..., None]
        cache.add(quantized, plain if mixed else quantized, target, weight, more=len(batches) - index - 1)
    if not cache.rows:
        raise fail(STAGE, "batches", "at least one sample", f"none in {len(batches)} batches")
    cache.normalize()
    return cache


def watch(
    p: Prepared, unit: Unit, batch: Any, index: int, inputs_only: bool = False, stage: str = STAGE
) -> tuple[Call, Tensor]:
    """The arguments and output of the unit's first call; the model runs no further."""
    seen: list = []

    def before(_, args, kwargs):
        seen.append(Call.of(args, kwargs))
        if inputs_only:
            raise Stop

    def after(_, args, output):
        seen.append(first_tensor(output).clone())
        raise Stop

    modules = unit.modules(p.model)
    handles = [modules[0].register_forward_pre_hook(before, with_kwargs=True), modules[-1].register_forward_hook(after)]
    try:
        call(p, batch, index, stage)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise fail(stage, f"batch {index}", f"one that runs {unit.name}", "one that does not")
    return seen[0], seen[-1]


@torch.no_grad()
def outputs_of(p: Prepared, batches: list, room: Room) -> list[Tensor]:
    """The float model's output for each batch."""
    with p.quantized(set()):
        return [room.hold(first_tensor(call(p, batch, i, STAGE))) for i, batch in enumerate(batches)]


def fisher(p: Prepared, module: nn.Module, batch: Any, index: int, output: Tensor) -> Tensor:
    """The squared gradient of the task's loss with respect to the unit's output, each sample by itself.

    The model runs with the layers quantized that are so now. Source: Li et al., BRECQ (2021), section 3.2 (the diagonal
    Fisher information in place of the pre-activation Hessian).
    """
    seen: list[Tensor] = []

    def after(_, args, found):
        if seen:  # a later call of the same module is part of what follows
            return found
        seen.append(first_tensor(found).detach().requires_grad_())
        return replaced(found, seen[0].clone())  # a copy: what follows may work in place

    handle = module.register_forward_hook(after)
    try:
        with torch.enable_grad():
            found = first_tensor(call(p, batch, index, STAGE))
            loss = task_loss(found, output.to(found.device), batch)
            reached = loss.requires_grad  # not by a pooler whose output is beside the one that is compared
            gradient = torch.autograd.grad(loss, seen[:1], allow_unused=True)[0] if reached else None
    finally:
        handle.remove()
    return torch.zeros_like(seen[0]) if gradient is None else gradient.square()


def replaced(output: Any, tensor: Tensor) -> Any:
    """output with its first floating tensor replaced."""
    leaves, spec = tree_flatten(output)
    wanted = first_tensor(output)
    return tree_unflatten([tensor if leaf is wanted else leaf for leaf in leaves], spec)


# --- the loss of a unit ----------------------------------------------------------------------------------------------


def loss_scale(output: Tensor, layers: list[QuantLayer]) -> float:
    """1 / (batch * positions): the loss is summed over channels and averaged over the rest, as in BRECQ, so that the
    penalty's weight keeps its meaning. A unit of layers that ends in a Linear has its channels at the end."""
    last = output.dim() < 3 or layers[-1].kind == "linear"
    channels = output.shape[-1 if last else 1] if output.dim() > 1 else 1
    return channels / max(1, output.numel())


Loss = Callable[[Tensor, Sample, float], tuple[Tensor, Tensor]]  # output, sample, scale -> loss, its slope for output


def weighted_square(output: Tensor, sample: Sample, scale: float) -> tuple[Tensor, Tensor]:
    """scale * sum of g^2 d^2, with d = output - target, and g^2 = 1 where there are no Fisher weights."""
    return ops.fisher_loss_and_slope(output, sample.target, sample.weight, scale)


def full_fisher(output: Tensor, sample: Sample, scale: float) -> tuple[Tensor, Tensor]:
    """scale * sum over samples of (sum of |g d|)^2 / values of a sample: at most the weighted square.

    As the released code of BRECQ has it, which divides by 100 instead. A sample's Fisher information is g g^T, whose
    form (sum of g d)^2 would let errors cancel along the one direction that is known.
    """
    assert sample.weight is not None
    difference, root = output.detach() - sample.target, sample.weight.sqrt()
    together = (root * difference.abs()).flatten(1).sum(1)
    share = scale / max(1, output[0].numel())
    slope = 2 * share * together.view(-1, *[1] * (output.dim() - 1)) * root * difference.sign()
    return share * together.square().sum(), slope


def power_of(exponent: float) -> Loss:
    """scale * sum of g |d|^exponent, with g = 1 where there are no weights."""

    def loss(output: Tensor, sample: Sample, scale: float) -> tuple[Tensor, Tensor]:
        difference = output.detach() - sample.target
        size = difference.abs()
        weight = scale if sample.weight is None else scale * sample.weight
        slope = exponent * weight * size.pow(exponent - 1) * difference.sign()
        return (weight * size.pow(exponent)).sum(), slope

    return loss


def unit_loss(
    module: nn.Module, sample: Sample, layers: list[QuantLayer], loss: Loss = weighted_square
) -> tuple[Tensor, Tensor, Tensor]:
    """The unit's output, its loss, and the gradient of the loss for the output: `output.backward(slope)` goes on."""
    output = first_tensor(module(*sample.args, **sample.kwargs))
    return output, *loss(output, sample, loss_scale(output, layers))


@torch.no_grad()
def loss_on_all(
    module: nn.Module, cache: Cache, rows: int, layers: list[QuantLayer], loss: Loss = weighted_square
) -> float:
    """The mean of the unit's loss over the cache, inputs from the quantized prefix."""
    total = 0.0
    for sample in cache.chunks(rows):
        total += unit_loss(module, sample, layers, loss)[1].item() * sample.rows
    return total / cache.rows
