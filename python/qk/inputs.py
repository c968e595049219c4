"""What a model is given: a tensor, a tuple or list of positional arguments, or a mapping of keywords."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

KINDS = (Tensor, tuple, list, Mapping)


def feed(model: nn.Module, inputs: Any) -> Any:
    """The model on its inputs; what it raises passes through."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; every module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def copied_to(inputs: Any, device: torch.device) -> Any:
    """The inputs with their own tensors on `device`, as a model may write into what it is given.

    What was one tensor stays one.
    """
    copies: dict[int, Tensor] = {}

    def one(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().to(device, copy=True)
        return copies[id(x)]

    return map_tensors(one, inputs)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The inputs with function(tensor) in place of every tensor; a mapping of any class becomes a dict."""
    return tree_map_only(Tensor, function, dict(inputs) if isinstance(inputs, Mapping) else inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, sets, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def bad_values(x: Tensor) -> int:
    """How many values are NaN or infinite; in a mask to be added to scores, of 0 and -inf alone, none is."""
    bad = int((~torch.isfinite(x)).sum()) if x.is_floating_point() else 0
    return 0 if bad and bool(((x == 0) | (x == -torch.inf)).all()) else bad


def resized(example: Any, batch: int) -> Any:
    """Every tensor of the example repeated or cut to `batch` along its first axis; a list of tensors among its
    arguments, such as a detector's images, as a list."""
    if isinstance(example, Mapping):
        return {name: _resized(value, batch) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(_resized(value, batch) for value in example)
    return _resized(example, batch)


def _resized(value: Any, batch: int) -> Any:
    if isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
        return [value[i % len(value)] for i in range(batch)] if value else value
    return map_tensors(lambda x: x[torch.arange(batch, device=x.device) % x.shape[0]] if x.dim() else x, value)


def part_generator(seed: int, number: int) -> torch.Generator:
    """Random numbers of one part of a run, such as a unit or a batch, that depend on no other part."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def digest(items: Iterable[tuple[str, Any]]) -> str:
    """sha256 over names and contents; of tensors with type and shape."""
    found = sha256()
    for name, value in items:
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            found.update(f"{name} {value!r}\n".encode())
    return found.hexdigest()


def describe(inputs: Any) -> str:
    """Types and shapes, for messages: (float32 [8, 3, 32, 32], int64 [8])."""
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in inputs) + ")"
    return type(inputs).__name__


def advice_on(inputs: Any) -> str:
    """What to do about inputs that the model refused."""
    if isinstance(inputs, (tuple, list)) and len(inputs) == 2 and _are_labels(inputs[1]):
        return "The second looks like labels: pass inputs only, such as [images for images, _ in loader]."
    return "A tensor is the only argument, a tuple holds positional ones, a dict keywords; labels are not passed."


def _are_labels(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() <= 1 and not x.is_floating_point()
