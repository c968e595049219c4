"""From an integer model to a graph of operators: torch.export, no writes in place, NHWC between integer layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from qk.deploy.fusing import nhwc
from qk.deploy.fusing.graph import (
    ADD,
    AS_IT_IS,
    CAT,
    DEQUANTIZE,
    FUNCTIONS,
    HARDTANH,
    INDEX_PUT,
    LAYERS,
    MUL,
    QUANTIZE,
    RELU,
    SPARQ,
    Constants,
    aten,
    qk,
)
from qk.deploy.fusing.inplace import NOTHING, functional
from qk.deploy.fusing.model import ExpectedTensor, ExpectedValue
from qk.errors import fail
from qk.inputs import copied_to, device_of, evaluating, map_tensors

STAGE = "qk.fuse"


def traced(model: nn.Module, example: Any) -> fx.GraphModule:
    """The model in eval mode as a graph of functional operators; the first axis of its inputs stays free.

    Raises QkError for a model that torch.export refuses, naming the module in which it stopped.
    """
    inputs = map_tensors(two, copied_to(example, device_of(model)))
    args, kwargs = _arguments(inputs)
    entered: list[str] = []
    with evaluating(model), _watched(model, entered), torch.no_grad():
        try:
            with redirect_stderr(StringIO()):  # where it cannot go on it prints the whole graph
                program = torch.export.export(model, args, kwargs, dynamic_shapes=_free(args, kwargs), strict=False)
        except Exception as error:
            where = f"{entered[-1]!r} ({type(model.get_submodule(entered[-1])).__name__})" if entered else "the model"
            got = f"{where}, in which it raised {type(error).__name__}: {_first_line(error)}"
            advice = f"What the graph depends on must not hang on values. {AS_IT_IS}"
            raise fail(STAGE, "model", "one that torch.export can follow", got, advice) from error
        module = functional(program)
    return module


def canonical(module: fx.GraphModule) -> Constants:
    """The same operators, those between integer layers in NHWC, steps and zeros of one value as one constant each."""
    return _Canonical(module).run()


def two(x: Tensor) -> Tensor:
    """A batch of one would be taken for a constant."""
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


def _arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _free(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """dynamic_shapes: the batch, and the length of sequences, where the model allows it."""
    auto = torch.export.Dim.AUTO

    def axes(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        return {i: auto for i in range(x.dim()) if i == 0 or (i == 1 and x.dim() in (2, 3))}

    shapes = (*(tree_map(axes, a) for a in args),), {k: tree_map(axes, v) for k, v in kwargs.items()}
    if not kwargs:
        return shapes[0]
    return shapes[1] if not args else None


@contextmanager
def _watched(model: nn.Module, entered: list[str]) -> Iterator[None]:
    """Keeps in `entered` the names of the modules that are running."""

    def leave(*_: Any) -> None:
        entered.pop()

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "nothing").strip()


# --- layout ---------------------------------------------------------------------------------------------------------


class _Canonical:
    """Copies a graph. What is [B, C, H, W] next to integer layers is kept as [B, H, W, C] in `image`, and permuted
    only for operators that are not known here."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.graph.set_codegen(module.graph._codegen)
        self.constants = Constants(module, self.graph)
        self.plain: dict[fx.Node, Any] = {}
        self.image: dict[fx.Node, fx.Node] = {}

    def run(self) -> Constants:
        for node in self.module.graph.nodes:
            self._copy(node)
            for new in reversed(self.graph.nodes):
                if new.op != "call_function" or "module" in new.meta:
                    break
                new.meta["module"] = _module_of(node)
        return self.constants

    def _copy(self, node: fx.Node) -> None:
        if node.op == "call_function":
            handler = self._handler(node)
            if handler is None or not handler(node):
                self._as_it_is(node)
        elif node.op == "get_attr":
            self.plain[node] = self.constants.named(node.target)
        elif node.op == "placeholder":
            self.plain[node] = self.graph.node_copy(node)
            self.plain[node].meta["val"] = node.meta.get("val")
        elif node.op == "output":
            self.graph.node_copy(node, self._plain)
        elif node.op == "call_module":
            self._as_it_is(node)

    def _handler(self, node: fx.Node) -> Any:
        if node.target in NOTHING:
            return self._same
        if node.target in (RELU, HARDTANH, aten.relu6.default, *FUNCTIONS):
            return self._elementwise
        if node.target in (ADD, MUL):
            return self._binary
        return {
            QUANTIZE: self._quantize,
            DEQUANTIZE: self._dequantize,
            SPARQ: self._sparq,
            LAYERS[0]: self._layer,
            LAYERS[1]: self._layer,
            qk.pool.default: self._named,
            INDEX_PUT: self._named,
            CAT: self._cat,
            aten.concat.default: self._cat,
            aten.permute.default: self._permute,
            aten.contiguous.default: self._contiguous,
            aten.max_pool2d.default: self._max_pool,
            aten.avg_pool2d.default: self._avg_pool,
            aten.adaptive_avg_pool2d.default: self._adaptive,
            aten.mean.dim: self._mean,
            aten.batch_norm.default: self._batch_norm,
            aten.flatten.using_ints: self._flatten,
            aten.view.default: self._flatten,
            aten.reshape.default: self._flatten,
            aten.squeeze.dims: self._flatten,
        }.get(node.target)

    # Each handler returns whether it made the node.

    def _same(self, node: fx.Node) -> bool:
        if len(node.args) > 2 and node.args[2]:  # dropout in training mode
            return False
        for made in (self.plain, self.image):
            if node.args[0] in made:
                made[node] = made[node.args[0]]
        return True

    def _elementwise(self, node: fx.Node) -> bool:
        target, rest = node.target, node.args[1:]
        if target is aten.relu6.default:
            target, rest = HARDTANH, (0, 6)
        elif target is HARDTANH:
            rest = tuple(int(v) if float(v).is_integer() else v for v in rest)
        made = self.image if node.args[0] in self.image else self.plain
        source = made[node.args[0]] if made is self.image else self._plain(node.args[0])
        made[node] = self.graph.call_function(target, (source, *rest), dict(node.kwargs))
        return True

    def _binary(self, node: fx.Node) -> bool:
        both = node.args[:2]
        tensors = all(isinstance(n, fx.Node) and n.meta["val"].dim() == 4 for n in both)
        if not tensors or not any(n in self.image for n in both) or node.kwargs:
            return False
        self.image[node] = self.graph.call_function(node.target, tuple(self._image(n) for n in both))
        return True

    def _quantize(self, node: fx.Node) -> bool:
        x, step, zero, bits = node.args
        if step.op != "get_attr" or step.meta["val"].numel() != 1:
            return False
        self.plain[node] = self.graph.call_function(QUANTIZE, (self._plain(x), *self._grid(step, zero), bits))
        return True

    def _dequantize(self, node: fx.Node) -> bool:
        codes, step, zero = node.args
        if step.op != "get_attr" or step.meta["val"].numel() != 1:
            return False
        self.plain[node] = self.graph.call_function(DEQUANTIZE, (self._plain(codes), *self._grid(step, zero)))
        return True

    def _sparq(self, node: fx.Node) -> bool:
        codes, *family, zero = _with_defaults(node, (None, None, 1, True, True, None))
        at = None if zero is None else self.constants.scalar(self.constants.tensor(zero))
        self.plain[node] = self.graph.call_function(SPARQ, (self._plain(codes), *family, at))
        return True

    def _layer(self, node: fx.Node) -> bool:
        given = self._by_names(node)
        self.plain[node].meta["module"] = given["weight"].target.rpartition(".")[0]
        return True

    def _named(self, node: fx.Node) -> bool:
        self._by_names(node)
        return True

    def _by_names(self, node: fx.Node) -> dict[str, Any]:
        """Makes an operator on codes x with every argument by its name, and returns what it was given."""
        names = [argument.name for argument in node.target._schema.arguments]
        given = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
        given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        kwargs = {name: self._plain(v) if isinstance(v, fx.Node) else v for name, v in given.items()}
        if "x_step" in given and given["x_step"].op == "get_attr":  # else there is none, or those of dynamic rows
            kwargs["x_step"], kwargs["x_zero"] = self._grid(given["x_step"], given["x_zero"])
        self.plain[node] = self.graph.call_function(node.target, (), kwargs)
        return given

    def _cat(self, node: fx.Node) -> bool:
        parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if axis not in (1, -3) or not any(n in self.image for n in parts):
            return False
        self.image[node] = self.graph.call_function(CAT, ([self._image(n) for n in parts], 3))
        return True

    def _permute(self, node: fx.Node) -> bool:
        x, axes = node.args[0], list(node.args[1])
        if axes == nhwc.NCHW:
            self.image[node] = self._plain(x)
        elif axes == nhwc.NHWC and x in self.image:
            self.plain[node] = self.image[x]
        else:
            return False
        return True

    def _contiguous(self, node: fx.Node) -> bool:
        """The same values, whatever asks them to lie so."""
        return False if len(node.args) > 1 or node.kwargs else self._same(node)

    def _max_pool(self, node: fx.Node) -> bool:
        x, kernel, stride, padding, dilation, ceil = _with_defaults(node, (None, None, [], [0, 0], [1, 1], False))
        window = (pair(kernel), pair(stride or kernel), pair(padding), pair(dilation), ceil)
        return self._pool(node, nhwc.max_pool, x, *window)

    def _avg_pool(self, node: fx.Node) -> bool:
        found = _with_defaults(node, (None, None, [], [0, 0], False, True, None))
        x, kernel, stride, padding, *rest = found
        return self._pool(node, nhwc.avg_pool, x, pair(kernel), pair(stride or kernel), pair(padding), *rest)

    def _adaptive(self, node: fx.Node) -> bool:
        x, size = node.args[0], pair(node.args[1])
        if list(x.meta["val"].shape[2:]) == size:  # the mean of one value
            return self._same(node)
        return self._pool(node, nhwc.adaptive_avg_pool, x, size)

    def _mean(self, node: fx.Node) -> bool:
        x, axes, keep = _with_defaults(node, (None, None, False))
        if axes is None or sorted(a % 4 for a in axes) != [2, 3] or node.kwargs or x.meta["val"].dim() != 4:
            return False
        if not self._pool(node, nhwc.mean, x):
            return False
        if not keep:
            self.plain[node] = self.graph.call_function(aten.flatten.using_ints, (self.image.pop(node), 1))
        return True

    def _pool(self, node: fx.Node, function: Any, x: fx.Node, *window: Any) -> bool:
        if x.meta["val"].dim() != 4 or x not in self.image:
            return False
        self.image[node] = self.graph.call_function(function, (self.image[x], *window))
        return True

    def _batch_norm(self, node: fx.Node) -> bool:
        x, weight, bias, mean, var, training, _, eps, *_ = node.args
        if training or x not in self.image or None in (weight, bias, mean, var):
            return False
        tensors = (self._plain(t) for t in (weight, bias, mean, var))
        self.image[node] = self.graph.call_function(nhwc.batch_norm, (self.image[x], *tensors, eps))
        return True

    def _flatten(self, node: fx.Node) -> bool:
        """[B, C, 1, 1] -> [B, C] is the same in both layouts."""
        x = node.args[0]
        if x not in self.image or node.meta["val"].dim() != 2:
            return False
        if list(x.meta["val"].shape[2:]) != [1, 1] or node.meta["val"].shape[1] != x.meta["val"].shape[1]:
            return False
        self.plain[node] = self.graph.call_function(aten.flatten.using_ints, (self.image[x], 1))
        return True

    def _as_it_is(self, node: fx.Node) -> None:
        """A view becomes a reshape: tensors lie otherwise here than where the model was traced, and nothing writes."""
        self.plain[node] = self.graph.node_copy(node, self._plain)
        self.plain[node].meta = {}
        if node.target in (aten.view.default, aten._unsafe_view.default):
            self.plain[node].target = aten.reshape.default

    def _plain(self, node: fx.Node) -> fx.Node:
        if node not in self.plain:
            self.plain[node] = self.graph.call_function(aten.permute.default, (self.image[node], nhwc.NCHW))
        return self.plain[node]

    def _image(self, node: fx.Node) -> fx.Node:
        if node not in self.image:
            self.image[node] = self.graph.call_function(aten.permute.default, (self.plain[node], nhwc.NHWC))
        return self.image[node]

    def _grid(self, step: fx.Node, zero: fx.Node) -> tuple[fx.Node, fx.Node]:
        tensors = (Constants.tensor(self.constants, n) for n in (step, zero))
        return tuple(self.constants.scalar(t) for t in tensors)


def _with_defaults(node: fx.Node, defaults: tuple) -> list[Any]:
    names = [argument.name for argument in node.target._schema.arguments]
    given = [*node.args, *defaults[len(node.args) :]]
    return [node.kwargs.get(name, value) for name, value in zip(names, given, strict=False)]


def pair(value: Any) -> list[int]:
    """One number for both axes, or two."""
    values = [value] if isinstance(value, int) else list(value)
    return [values[0], values[-1]]


def _module_of(node: fx.Node) -> str:
    """The name of the innermost module that the node was traced in."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _known(size: int | torch.SymInt) -> int | None:
    """A size that the trace depends on: what was free may be a number by then, as by len(x)."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def expected_inputs(graph: fx.Graph) -> list[ExpectedTensor | ExpectedValue]:
    """What each input must be: the graph holds the example's sizes that are not free, and what is no tensor."""
    found: list[ExpectedTensor | ExpectedValue] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            val = node.meta.get("val")
            if isinstance(val, Tensor):
                found.append(ExpectedTensor(node.target, val.dtype, tuple(map(_known, val.shape))))
            else:
                found.append(ExpectedValue(node.target, val))
    return found
