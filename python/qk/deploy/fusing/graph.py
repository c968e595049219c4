"""What the passes of fuse share: nodes of a torch.fx graph, what they are, and constants in it."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qk.deploy.fusing import nhwc

aten, qk = torch.ops.aten, torch.ops.qk

QUANTIZE, DEQUANTIZE = qk.quantize.default, qk.dequantize.default
ROWS = qk.quantize_rows.default
CONV2D, GEMM = qk.conv2d.default, qk.gemm.default
LAYERS = (CONV2D, GEMM)
INDEX_PUT, INDEX_SELECT = qk.index_put.default, qk.index_select.default
ENDS = (*LAYERS, INDEX_PUT)  # what makes a layer's result; the last puts channels of several points into it
SPARQ, ATTENTION = qk.sparq.default, qk.attention.default
RELU, HARDTANH = aten.relu.default, aten.hardtanh.default
ADD, MUL, CAT = aten.add.Tensor, aten.mul.Tensor, aten.cat.default
POOLS = (nhwc.avg_pool, nhwc.adaptive_avg_pool, nhwc.mean)
# Functions of one value: on codes of 8 bits they are a table.
FUNCTIONS = (
    aten.hardswish.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
AS_IT_IS = "The unfused model works as it is."  # advice of errors
# Values in another place: they commute with everything that works on single values.
MOVES = (
    aten.permute.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dims,
    aten.squeeze.dim,
    aten.unsqueeze.default,
)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def activation_of(node: fx.Node) -> str | None:
    """ "relu" or "relu6" if that is what the node computes."""
    if is_call(node, RELU):
        return "relu"
    if is_call(node, HARDTANH, aten.clamp.default) and tuple(node.args[1:]) == (0, 6) and not node.kwargs:
        return "relu6"
    return None


def is_dynamic(node: Any) -> bool:
    """Whether it is a layer whose input has a step for each row: no constant, so no part of a program."""
    return is_call(node, *LAYERS) and node.kwargs["x_step"].op != "get_attr"


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node computes with: no constants, sizes or steps."""
    if is_call(node, CAT):
        return list(node.args[0])
    if is_call(node, *LAYERS):
        return [node.kwargs["x"]] + [n for n in [node.kwargs.get("residual")] if n is not None]
    if is_call(node, INDEX_PUT):
        return [node.kwargs[name] for name in ("x", "added", "residual") if node.kwargs[name] is not None]
    if is_call(node, ATTENTION):
        return [node.kwargs[name] for name in "qkv"]
    if is_call(node, QUANTIZE):  # also of a parameter
        return [node.args[0]]
    return [n for n in node.all_input_nodes if n.op != "get_attr"]


def only_user(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """On the example: its first size is the batch."""
    return node.meta["shape"]


class Constants:
    """A graph in work and its tensors; scalars of one value are one node, so that grids are compared by their nodes."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self._by_value: dict[tuple, fx.Node] = {}
        self._by_name: dict[str, fx.Node] = {}
        self._numbers = itertools.count()
        self.device = next((t.device for t in (*root.buffers(), *root.parameters())), torch.device("cpu"))

    def tensor(self, node: fx.Node) -> Tensor:
        value: Any = self.root
        for part in node.target.split("."):
            value = getattr(value, part)
        return value

    def named(self, name: str) -> fx.Node:
        """The node of a tensor that the root has."""
        if name not in self._by_name:
            self._by_name[name] = self._insert(name)
        return self._by_name[name]

    def scalar(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor with one value, such as a step."""
        key = (tensor.dtype, tensor.item())
        if key not in self._by_value:
            self._by_value[key] = self.add("step" if tensor.is_floating_point() else "zero", tensor.reshape(1))
        return self._by_value[key]

    def add(self, kind: str, tensor: Tensor) -> fx.Node:
        """The node of a new tensor."""
        name = next(n for n in (f"qk_{kind}_{i}" for i in self._numbers) if not hasattr(self.root, n))
        self.root.register_buffer(name, tensor.detach())
        return self._insert(name)

    def _insert(self, name: str) -> fx.Node:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after():
            return self.graph.get_attr(name)


class Grid:
    """Step and zero (nodes of constants) and width of a tensor's codes."""

    def __init__(self, step: fx.Node, zero: fx.Node, bits: int) -> None:
        self.step, self.zero, self.bits = step, zero, bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and (self.step, self.zero, self.bits) == (other.step, other.zero, other.bits)

    def __hash__(self) -> int:
        return hash((self.step, self.zero, self.bits))


def grid_of(node: fx.Node) -> Grid | None:
    """Of the codes that the node makes; None if it makes values."""
    if is_call(node, QUANTIZE):
        return Grid(*node.args[1:])
    if is_call(node, qk.lookup.default, operator.getitem):
        return node.meta.get("grid")
    if is_call(node, qk.pool.default) and node.kwargs["mode"] == "max":
        return grid_of(node.kwargs["x"])
    if is_call(node, *MOVES, SPARQ, INDEX_SELECT):
        return grid_of(node.args[0])
    if node.op == "call_function" and node.kwargs.get("out_step") is not None:
        return Grid(node.kwargs["out_step"], node.kwargs["out_zero"], node.kwargs["out_bits"])
    return None


def with_shape(node: fx.Node, like: fx.Node | tuple[int, ...], source: fx.Node | None = None) -> fx.Node:
    """Gives a new node the shape of another and, for reports, the module that `source` came from."""
    node.meta["shape"] = like if isinstance(like, tuple) else like.meta.get("shape")
    source = like if source is None and isinstance(like, fx.Node) else source
    if source is not None and "module" in source.meta:
        node.meta["module"] = source.meta["module"]
    return node


def finished(constants: Constants) -> fx.GraphModule:
    """A module of the graph with the constants that it uses."""
    graph = constants.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(constants.root, graph)


def merge_equal(graph: fx.Graph) -> None:
    """One node for operators of qk, permutations and products that compute the same."""
    seen: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target in (*MOVES, MUL) or "qk." in str(node.target)):
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
