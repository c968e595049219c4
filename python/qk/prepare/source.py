"""What comes in: the model and the example, checked before work starts, and copied so that nobody's own is changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qk import _native
from qk.errors import fail
from qk.inputs import KINDS, advice_on, bad_values, copied_to, describe, device_of, feed, tensors_in

STAGE = "qk.prepare"

WRAPPERS = {  # -> what holds the plain module
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def check_model(model: nn.Module) -> None:
    """Raises QkError for what is no plain, initialized nn.Module on a device with kernels."""
    if not isinstance(model, nn.Module):
        raise fail(STAGE, "model", "an nn.Module", type(model).__name__)
    if isinstance(model, torch.jit.ScriptModule):
        raise fail(STAGE, "model", "a Python nn.Module", "a ScriptModule", "Give the model it was made from.")
    if getattr(model, "qk_info", None) is not None:
        raise fail(STAGE, "model", "a float model", "one that qk quantized already", "Give the one it was made from.")
    for name, module in model.named_modules():
        kind, place = type(module).__name__, f"model.{name}" if name else "model"
        if kind in WRAPPERS:
            raise fail(STAGE, place, "a plain module", f"a {kind}", f"Give {place}.{WRAPPERS[kind]}.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise fail(STAGE, "model", "initialized", f"lazy parameter {name}", "Run the model once before.")
    check_device(model, STAGE)


def check_device(model: nn.Module, stage: str) -> None:
    """Raises QkError for a tensor of the model on a device for which no kernels are loaded."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type not in ("cpu", "cuda"):
            raise fail(stage, "model", "on cpu or cuda", f"{name} on {tensor.device}", "Build or move it there first.")
        if tensor.device.type == "cuda" and _native.cuda_error is not None:
            got = f"{name} on {tensor.device} and no CUDA kernels: {_native.cuda_error}"
            raise fail(
                stage, "model", "on a device with kernels", got, "Use model.cpu(); qk doctor shows what is there."
            )


def check_example(example: Any) -> None:
    """Raises QkError for an example of the wrong kind, without values, or with NaN or Inf."""
    if not isinstance(example, KINDS):
        raise fail(STAGE, "example", "a tensor, a tuple of arguments or a dict of keywords", type(example).__name__)
    tensors = list(tensors_in(example))
    if not tensors or any(t.numel() == 0 for t in tensors):
        raise fail(STAGE, "example", "one batch with at least one value in every tensor", describe(example))
    for t in tensors:
        if bad := bad_values(t):
            raise fail(STAGE, "example", "finite", f"{bad} NaN or Inf among {t.numel()} values of {describe(t)}")


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode; the original keeps its mode, its hooks and its weights."""
    # Weights that hooks compute (weight norm, pruning) are no leaves, which deepcopy refuses; the hooks make them anew.
    tensors = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    memo = {id(t): t.detach().clone() for t in tensors}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        got = f"{type(model).__name__}, on which it raised {type(error).__name__}: {error}"
        raise fail(STAGE, "model", "a module that copy.deepcopy can copy", got) from error
    call_every_layer(copied)
    return copied.eval()


def call_every_layer(model: nn.Module) -> None:
    """Takes the fused paths from torch's encoders: they read the weights of linear1 and linear2, and so pass by what
    stands in their place."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def run(model: nn.Module, example: Any) -> Any:
    """The model on one example, on its own device. What it raises becomes a QkError."""
    try:
        return feed(model, copied_to(example, device_of(model)))
    except Exception as error:
        got = f"{describe(example)}, on which it raised {type(error).__name__}: {error}"
        raise fail(STAGE, "example", "input that the model accepts", got, advice_on(example)) from error
