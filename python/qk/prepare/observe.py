"""Watches a model run once: what is called, what reads which tensor. Nothing is traced, any Python is allowed."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qk.errors import QkError, fail
from qk.prepare.tree import tensors_in

STAGE = "qk.prepare"


class Value(NamedTuple):
    """What a tensor held at one moment: the same Value is the same numbers, seen through the same view."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int  # writes to the storage so far


@dataclass
class Call:
    """One call of a module. inside: the calls around it, outermost first. inputs, outputs: the tensors, in order.

    single: the first argument and the (first) result are tensors, so the call can be repeated from stored inputs.
    """

    module: str
    inside: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    single: bool = False


@dataclass
class Observation:
    """calls: by module name, in the order in which the modules first started. readers: Value -> the module in which each
    operator read it, "" for the model itself. results: what the model returned.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    readers: dict[Value, list[str]] = field(default_factory=lambda: defaultdict(list))
    results: set[Value] = field(default_factory=set)


class _Watch(TorchDispatchMode):
    """Sees every operator. Holds each tensor that it saw, so that no address is used twice while it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Observation()
        self.stack: list[Call] = []
        self.writes: dict[int, int] = defaultdict(int)
        self.held: list[Tensor] = []

    def value(self, x: Tensor) -> Value:
        self.held.append(x)
        try:
            storage, offset, stride = x.untyped_storage()._cdata, x.storage_offset(), tuple(x.stride())
        except (RuntimeError, NotImplementedError):  # sparse, nested: no storage to compare
            storage, offset, stride = id(x), 0, ()
        return Value(storage, offset, tuple(x.shape), stride, x.dtype, self.writes[storage])

    def values(self, x: Any) -> tuple[Value, ...]:
        return tuple(self.value(t) for t in tensors_in(x))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reader = self.stack[-1].module if self.stack else ""
        for value in self.values((args, kwargs)):
            self.seen.readers[value].append(reader)
        result = func(*args, **kwargs)
        # A tensor's own version counter moves only after this function returned, and not at all in inference mode.
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in tensors_in(args[i] if i < len(args) else kwargs.get(argument.name)):
                    self.writes[self.value(written).storage] += 1
        return result

    def enter(self, name: str, args: tuple, kwargs: dict) -> None:
        call = Call(name, tuple(c.module for c in self.stack), self.values((args, kwargs)))
        first = args[0] if args else next(iter(kwargs.values()), None)
        call.single = isinstance(first, Tensor)
        self.seen.calls.setdefault(name, []).append(call)
        self.stack.append(call)

    def leave(self, name: str, result: Any) -> None:
        while self.stack[-1].module != name:  # calls that ended in an exception which the model caught
            self.stack.pop()
        call = self.stack.pop()
        call.outputs = self.values(result)
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        call.single = call.single and isinstance(first, Tensor)


def observe(model: nn.Module, example: Any) -> Observation:
    """Runs `model` once on `example` without gradients. The model's own hooks run too; ours are gone afterwards."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks with keywords; its operators are still seen

        def enter(_module, args, kwargs, name=name):
            watch.enter(name, args, kwargs)

        def leave(_module, _args, _kwargs, result, name=name):
            watch.leave(name, result)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.no_grad(), watch:
            result = run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    watch.seen.results = set(watch.values(result))
    return watch.seen


def run(model: nn.Module, example: Any) -> Any:
    """The model on one example: a tensor, a tuple of positional arguments or a mapping of keywords."""
    example = _copied(example)  # a model may write into its input
    try:
        if isinstance(example, Tensor):
            return model(example)
        return model(*example) if isinstance(example, tuple) else model(**example)
    except QkError:
        raise
    except Exception as error:
        raise fail(
            STAGE,
            "example",
            "input that the model accepts",
            f"{describe(example)}, on which it raised {type(error).__name__}: {error}",
            "Give a tensor, a tuple of positional arguments, or a dict of keyword arguments.",
        ) from error


def check_example(example: Any) -> None:
    """Raises QkError for an example of the wrong kind, without values, or with NaN or Inf."""
    if not isinstance(example, (Tensor, tuple, Mapping)):
        raise fail(STAGE, "example", "a tensor, a tuple of arguments or a dict of keywords", type(example).__name__)
    tensors = list(tensors_in(example))
    if not tensors or any(t.numel() == 0 for t in tensors):
        raise fail(STAGE, "example", "one batch with at least one value in every tensor", describe(example))
    for t in tensors:
        if t.is_floating_point() and not torch.isfinite(t).all():
            bad = int((~torch.isfinite(t)).sum())
            raise fail(STAGE, "example", "finite", f"{bad} NaN or Inf among {t.numel()} values of {describe(t)}")


def check_model(model: nn.Module) -> None:
    """Raises QkError for what is no plain nn.Module on a device with kernels."""
    if not isinstance(model, nn.Module):
        raise fail(STAGE, "model", "an nn.Module", type(model).__name__)
    for name, module in model.named_modules():
        inner = next(
            (a for a in ("module", "_orig_mod") if type(module).__name__ in _WRAPPERS and a in module._modules), None
        )
        if inner is not None:
            place = f"model.{name}" if name else "model"
            raise fail(
                STAGE,
                "model",
                "the plain model",
                f"{place} wrapped in {type(module).__name__}",
                f"Give {place}.{inner}.",
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise fail(STAGE, "model", "a Python nn.Module", "a ScriptModule", "Give the model it was made from.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise fail(STAGE, "model", "initialized", f"lazy parameter {name}", "Run the model once before.")
        if tensor.device.type not in ("cpu", "cuda"):
            raise fail(STAGE, "model", "on cpu or cuda", f"{name} on {tensor.device}", "Move the model there first.")


_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode; the original keeps its mode, its hooks and its weights."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise fail(
            STAGE, "model", "a module that copy.deepcopy can copy", f"{type(error).__name__}: {error}"
        ) from error
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused path takes the weights of linear1 and linear2 and would pass by what stands in their place.
            module.activation_relu_or_gelu = 0
    return copied.eval()


def describe(x: Any) -> str:
    """Shapes and types of an example, for messages."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in x) + ")"
    return type(x).__name__


def _copied(example: Any) -> Any:
    """The example with its own tensors; what was one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def one(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone()
        return copies[id(x)]

    return tree_map_only(Tensor, one, dict(example) if isinstance(example, Mapping) else example)
