"""The float network as operators that a device may know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qk.deploy.fusing.graph import (
    ADD,
    CAT,
    FUNCTIONS,
    HARDTANH,
    MOVES,
    MUL,
    RELU,
    Constants,
    aten,
    is_call,
    shape_of,
)
from qk.deploy.fusing.inplace import NOTHING
from qk.deploy.fusing.running import note_shapes
from qk.deploy.fusing.tensors import factor_and_shift
from qk.deploy.fusing.trace import pair, traced
from qk.hago.hardware import Kind

CONV, LINEAR, SAME = aten.conv2d.default, aten.linear.default, aten.conv2d.padding
WEIGHTED = (CONV, LINEAR, SAME, aten.conv1d.default, aten.conv3d.default, aten.conv_transpose2d.input)
CLIPS = (HARDTANH, aten.clamp.default, aten.relu6.default)
AVERAGES = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
PLACES = (*MOVES, *NOTHING, aten.contiguous.default)  # values at another place


def float_graph(model: nn.Module, example: Any, norms: bool = False) -> Constants:
    """A float model as functional operators that know their shapes. norms: a BatchNorm of images that no convolution
    absorbed becomes a depthwise one of 1 x 1, as devices have them.

    Raises QkError for a model that torch.export cannot follow."""
    module = traced(model, example)
    constants = Constants(module, module.graph)
    for node in list(module.graph.nodes):
        if is_call(node, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # integer layers leave their results in another order
        elif is_call(node, SAME):
            _with_numbers(node)
        elif norms and is_call(node, aten.batch_norm.default):
            _as_layer(constants, node)
    note_shapes(constants, example)
    return constants


def _with_numbers(node: fx.Node) -> None:
    """Padding "same" or "valid" in numbers, where both sides have as much."""
    size, dilation = node.args[1].meta["val"].shape[2:], pair(argument(node, "dilation", 1))
    whole = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if argument(node, "padding", "valid") == "valid":
        whole = [0, 0]
    if not any(n % 2 for n in whole):
        stride, groups = pair(argument(node, "stride", 1)), argument(node, "groups", 1)
        bias = node.args[2] if len(node.args) > 2 else None
        node.args = (*node.args[:2], bias, stride, [n // 2 for n in whole], dilation, groups)
        node.target, node.kwargs = CONV, {}


def _as_layer(constants: Constants, node: fx.Node) -> None:
    x, *tensors, training, _, eps, _ = node.args
    if training or None in tensors or any(t.op != "get_attr" for t in tensors) or x.meta["val"].dim() != 4:
        return
    factor, shift = factor_and_shift(constants, tensors, eps)
    weight, bias = constants.add("norm", factor.float().reshape(-1, 1, 1, 1)), constants.add("norm", shift)
    node.target, node.args = CONV, (x, weight, bias, [1, 1], [0, 0], [1, 1], len(shift))


def kind_of(node: fx.Node) -> Kind | None:
    """None for what no device computes in integers."""
    if node.op != "call_function" or "shape" not in node.meta or not _reads_values(node):
        return None
    if is_call(node, CONV):
        channels, groups = shape_of(node.args[0])[1], argument(node, "groups", 1)
        if groups == 1:
            return "conv2d"
        return "depthwise_conv2d" if groups == channels else "grouped_conv2d"
    if is_call(node, LINEAR):
        return "dense"
    if is_call(node, ADD, MUL):
        both = sources_of(node)
        if len(both) != 2 or node.kwargs:
            return None
        if is_call(node, MUL):
            return "multiply" if _is_gated(*map(shape_of, both)) else None
        return "add" if shape_of(both[0]) == shape_of(both[1]) else None
    if is_call(node, RELU):
        return "relu"
    if is_call(node, *CLIPS) and bounds_of(node) == (0, 6):
        return "clip"
    if is_call(node, aten.max_pool2d.default):
        return "max_pool2d"
    if is_call(node, *AVERAGES) and window_of(node) is not None:
        return "avg_pool2d"
    if is_call(node, CAT):
        return "concatenate"
    if is_call(node, *PLACES):
        return "reshape"
    return "function" if is_call(node, *FUNCTIONS) else None


def _reads_values(node: fx.Node) -> bool:
    """Whether it reads float activations whose shapes are known, and a layer's weight and bias are parameters."""
    found = sources_of(node)
    if is_call(node, CONV, LINEAR):
        parameters = node.args[1:3]
        if found != [node.args[0]] or not all(x is None or x.op == "get_attr" for x in parameters):
            return False
    elif is_call(node, CAT) and len(found) < len(node.args[0]):
        return False
    return bool(found) and all("shape" in x.meta and x.meta["dtype"].is_floating_point for x in found)


def _is_gated(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one is an image, the other a value for each of its channels."""
    return len(a) == 4 and len(b) == 4 and (b == (*a[:2], 1, 1) or a == (*b[:2], 1, 1))


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values it computes with, but parameters; the same one twice where it reads it twice."""
    given: Iterable[Any] = node.args[0] if is_call(node, CAT) else node.args[: 1 if is_call(node, *PLACES) else None]
    return [x for x in given if isinstance(x, fx.Node) and x.op != "get_attr"]


def argument(node: fx.Node, name: str, default: Any) -> Any:
    """Of an ATen operator, by position or name."""
    names = [a.name for a in node.target._schema.arguments]
    place = names.index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def bounds_of(node: fx.Node) -> tuple[Any, Any]:
    """Of an operator that clips."""
    return (0, 6) if is_call(node, aten.relu6.default) else tuple(node.args[1:3])


def window_of(node: fx.Node) -> dict[str, Any] | None:
    """What an average goes over; None where its windows differ in size or are not of an image."""
    x = shape_of(sources_of(node)[0])
    if len(x) != 4:
        return None
    if is_call(node, aten.mean.dim):
        axes = sorted(axis % 4 for axis in (argument(node, "dim", None) or ()))
        return _window(list(x[2:])) if axes == [2, 3] else None
    if is_call(node, aten.adaptive_avg_pool2d.default):
        size = pair(node.args[1])
        if any(a % b for a, b in zip(x[2:], size, strict=True)):
            return None
        return _window([a // b for a, b in zip(x[2:], size, strict=True)])
    kernel = pair(node.args[1])
    padding = pair(argument(node, "padding", 0))
    uneven = any(padding) and not argument(node, "count_include_pad", True)
    if uneven or argument(node, "ceil_mode", False) or argument(node, "divisor_override", None) is not None:
        return None
    return {"kernel": kernel, "stride": pair(argument(node, "stride", None) or kernel), "padding": padding}


def _window(kernel: list[int]) -> dict[str, Any]:
    return {"kernel": kernel, "stride": kernel, "padding": [0, 0]}


def keeps_axis(node: fx.Node, axis: int) -> bool:
    """Whether channels on axis 1 or -1 lie there in the result of what moves values or averages images, too."""
    if is_call(node, aten.contiguous.default, *NOTHING):
        return True
    if is_call(node, aten.max_pool2d.default, *AVERAGES):
        return axis == 1
    x, y = shape_of(sources_of(node)[0]), shape_of(node)
    if not is_call(node, aten.flatten.using_ints, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims):
        return False
    if axis == -1:
        return x[-1] == y[-1]
    return y[:2] == x[:2] and all(n == 1 for n in (*x[2:], *y[2:]))


def macs_of(node: fx.Node, weight: Tensor) -> int:
    """Multiply-accumulates of a layer on the example."""
    return torch.Size(shape_of(node)).numel() // weight.shape[0] * weight.numel()


def conv_arguments(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups, as torch's function takes them."""
    both = (pair(argument(node, name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return (*both, argument(node, "groups", 1))


def is_flat(node: fx.Node) -> bool:
    """Whether an average gives its values without the axes of the image."""
    return node.target is aten.mean.dim and not argument(node, "keepdim", False)
