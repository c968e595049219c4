"""Watches a model run once: what is called, what reads which tensor. Nothing is traced, any Python is allowed."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qk.inputs import tensors_in
from qk.prepare.source import run


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

    first: the first argument of its forward, given by place or by name; None if that is no tensor.
    single: the first argument and the (first) result are tensors, so the call can be repeated from stored inputs.
    """

    module: str
    inside: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...] = ()
    first: Value | None = None
    single: bool = False


@dataclass
class Operator:
    """One operator that ran. function: as torch dispatches it, such as aten.relu.default. args, kwargs: with the Value
    in place of each tensor that stands there by itself. inside: the calls around it, outermost first."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    inside: tuple[str, ...]

    @property
    def module(self) -> str:
        """The innermost of these calls, "" for the model itself."""
        return self.inside[-1] if self.inside else ""


@dataclass
class Observation:
    """calls: by module name, in the order in which the modules first started. readers: Value -> the module in which
    each operator read it, "" for the model itself. read: Value -> these operators. results: what the model returned.
    feeds: Conv2d or Linear -> those that read what operators made of its output, without another one between.
    written: storage and writes to it so far -> the calls around the next write, outermost first.
    held: every tensor that was seen, so that no address means another one as long as this is in use.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    readers: dict[Value, list[str]] = field(default_factory=lambda: defaultdict(list))
    read: dict[Value, list[Operator]] = field(default_factory=lambda: defaultdict(list))
    results: set[Value] = field(default_factory=set)
    feeds: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    written: dict[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list, repr=False)


def observe(model: nn.Module, example: Any) -> Observation:
    """Runs `model` once on `example` without gradients. The model's own hooks run too; ours are gone afterwards."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks with keywords; its operators are still seen

        is_layer = isinstance(module, (nn.Conv2d, nn.Linear))

        def enter(module, args, kwargs, name=name, is_layer=is_layer):
            watch.enter(name, args, kwargs, is_layer, args[0] if args else kwargs.get(first_name(module)))

        def leave(_module, _args, _kwargs, result, name=name, is_layer=is_layer):
            watch.leave(name, result, is_layer)

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


def first_name(module: nn.Module) -> str | None:
    """Of the first argument of its forward."""
    return next(iter(inspect.signature(module.forward).parameters), None)


class _Watch(TorchDispatchMode):
    """Sees every operator."""

    supports_higher_order_operators = True  # each is one operator that reads its arguments

    def __init__(self) -> None:
        super().__init__()
        self.seen = Observation()
        self.stack: list[Call] = []
        self.writes: dict[int, int] = defaultdict(int)
        self.sources: dict[int, frozenset[str]] = {}  # storage -> the layers of whose outputs it was made

    def value(self, x: Tensor) -> Value:
        self.seen.held.append(x)
        try:
            storage, offset, stride = x.untyped_storage()._cdata, x.storage_offset(), tuple(x.stride())
        except (RuntimeError, NotImplementedError):  # sparse, nested: no storage to compare
            storage, offset, stride = id(x), 0, ()
        return Value(storage, offset, tuple(x.shape), stride, x.dtype, self.writes[storage])

    def values(self, x: Any) -> tuple[Value, ...]:
        return tuple(self.value(t) for t in tensors_in(x))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = tuple(call.module for call in self.stack)
        reader = inside[-1] if inside else ""
        read = self.values((args, kwargs))
        for value in read:
            self.seen.readers[value].append(reader)
        plain_args = tuple(self.value(x) if isinstance(x, Tensor) else x for x in args)
        plain_kwargs = {k: self.value(x) if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        result = func(*args, **kwargs)
        sources = self.sources_of(read)
        # A tensor's own version counter moves only after this function returned, and not at all in inference mode.
        for i, argument in enumerate(func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in tensors_in(args[i] if i < len(args) else kwargs.get(argument.name)):
                    storage = self.value(written).storage
                    self.seen.written[storage, self.writes[storage]] = inside
                    self.writes[storage] += 1
                    self.sources[storage] = sources
        operator = Operator(func, plain_args, plain_kwargs, self.values(result), inside)
        for value in dict.fromkeys(read):
            self.seen.read[value].append(operator)
        for value in operator.outputs:
            self.sources[value.storage] = self.sources.get(value.storage, frozenset()) | sources
        return result

    def sources_of(self, values: tuple[Value, ...]) -> frozenset[str]:
        return frozenset().union(*(self.sources.get(value.storage, ()) for value in values))

    def enter(self, name: str, args: tuple, kwargs: dict, is_layer: bool, own: Any) -> None:
        """own: the first argument of its forward."""
        call = Call(name, tuple(c.module for c in self.stack), self.values((args, kwargs)))
        if is_layer:
            for source in self.sources_of(call.inputs):
                self.seen.feeds[source].add(name)
        first = args[0] if args else next(iter(kwargs.values()), None)
        call.single = isinstance(first, Tensor)
        call.first = self.value(own) if isinstance(own, Tensor) else None
        self.seen.calls.setdefault(name, []).append(call)
        self.stack.append(call)

    def leave(self, name: str, result: Any, is_layer: bool) -> None:
        while self.stack[-1].module != name:  # calls that ended in an exception which the model caught
            self.stack.pop()
        call = self.stack.pop()
        call.outputs = self.values(result)
        if is_layer:
            self.sources |= {value.storage: frozenset({name}) for value in call.outputs}
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        call.single = call.single and isinstance(first, Tensor)
