"""From operators to programs: integer operators without a float one between them become one call of `network`."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qk.deploy.fusing import nhwc
from qk.deploy.fusing.graph import (
    ATTENTION,
    CONV2D,
    DEQUANTIZE,
    GEMM,
    INDEX_PUT,
    INDEX_SELECT,
    LAYERS,
    QUANTIZE,
    SPARQ,
    Constants,
    Grid,
    aten,
    grid_of,
    inputs_of,
    is_call,
    qk,
    shape_of,
)
from qk.deploy.program import Builder, encode
from qk.ops._program import keeps_scale, score_bits
from qk.ops.sparq import FAMILIES

LOOKUP, POOL, CONCAT = qk.lookup.default, qk.pool.default, qk.concat.default
SUM, PRODUCT = qk.add.default, qk.multiply.default
FLATTEN, PERMUTE = aten.flatten.using_ints, aten.permute.default
WINDOW = ("kernel", "stride", "padding", "dilation")


@dataclass
class Region:
    """What one call of `network` runs. steps: for each step its operator and the module that it came from."""

    program: str
    steps: list[tuple[str, str]]
    weights: dict[int, str] = field(default_factory=dict)  # offset in the constants -> name of the prepacked weight


def build_regions(constants: Constants) -> list[Region]:
    """Puts a call of `network` in the place of every group of operators that programs have. In place."""
    graph = constants.graph
    depths = _depths(graph, constants)
    groups: dict[int, list[fx.Node]] = {}
    for node, depth in depths.items():
        groups.setdefault(depth, []).append(node)
    regions = [_build(graph, constants, nodes) for _, nodes in sorted(groups.items())]
    _sort(graph)
    return regions


def _depths(graph: fx.Graph, constants: Constants) -> dict[fx.Node, int]:
    """For each operator of a program, how many others lie before it on a path: those of one depth can be one call, as
    no path between them leaves it."""
    depth: dict[fx.Node, int] = {}
    found = {}
    for node in graph.nodes:
        inside = _in_programs(node, constants)
        before = [depth[n] + (inside and n not in found) for n in node.all_input_nodes]
        depth[node] = max(before, default=0)
        if inside:
            found[node] = depth[node]
    return found


def _in_programs(node: fx.Node, constants: Constants) -> bool:
    if node.op != "call_function" or "shape" not in node.meta:
        return False
    if is_call(node, QUANTIZE, DEQUANTIZE):
        codes = node.args[0] if is_call(node, DEQUANTIZE) else node
        return constants.tensor(node.args[1]).numel() == 1 and grid_of(codes) is not None
    if is_call(node, *LAYERS):
        grid = grid_of(node.kwargs["x"])
        return grid is not None and (grid.step, grid.zero) == (node.kwargs["x_step"], node.kwargs["x_zero"])
    if is_call(node, ATTENTION):
        return all(grid_of(codes) is not None for codes in inputs_of(node))
    if is_call(node, POOL):
        return node.kwargs["divisor_override"] is None and node.kwargs["activation"] == "none"
    if is_call(node, PRODUCT):
        return node.kwargs["x_step"] is not None and len(shape_of(node)) == 4
    if is_call(node, LOOKUP):
        return grid_of(node.args[0]) is not None
    if is_call(node, SPARQ):
        grid, zero = grid_of(node.args[0]), node.args[5]
        return grid is not None and (zero is grid.zero or (zero is None and not constants.tensor(grid.zero).any()))
    if is_call(node, INDEX_SELECT):
        return grid_of(node) is not None
    if is_call(node, FLATTEN):
        return grid_of(node.args[0]) is not None and list(node.args[1:]) == [1]
    return is_call(node, SUM, CONCAT, INDEX_PUT)


def _sort(graph: fx.Graph) -> None:
    """Every node behind what it reads, else in the order that there is."""
    placed: set[fx.Node] = set()
    order: list[fx.Node] = []
    for last in list(graph.nodes):
        stack = [last]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in placed]
            if missing:
                stack += missing[::-1]
                continue
            stack.pop()
            if node not in placed:
                placed.add(node)
                order.append(node)
    for node, following in zip(order[-2::-1], order[:0:-1], strict=True):
        if node.next is not following:
            following.prepend(node)


def _build(graph: fx.Graph, constants: Constants, nodes: list[fx.Node]) -> Region:
    inside = set(nodes)
    writer = _Writer(constants)
    for node in nodes:
        writer.write(node, inside)
    read_outside = [node for node in nodes if any(user not in inside for user in node.users)]
    for node in read_outside:
        writer.output(node)
    program = writer.builder.program()
    weights = {program.steps[i].constants["weight"]: weight.target for i, weight in writer.layers.items()}
    region = Region(encode(program), writer.steps, weights)
    with graph.inserting_after(nodes[-1]):
        tensors = [constants.add("constants", tensor) for tensor in writer.builder.constants()]
        call = graph.call_function(qk.network.default, (writer.sources, tensors, region.program))
    for i, node in enumerate(read_outside):
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, i))
        result.meta = node.meta | {"grid": grid_of(node)}
        if node in writer.turned:
            for user in [user for user in node.users if user not in inside]:
                user.replace_all_uses_with(result)
                graph.erase_node(user)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    return region


class _Writer:
    """Nodes as steps of a program."""

    def __init__(self, constants: Constants) -> None:
        self.constants, self.builder = constants, Builder()
        self.ids: dict[fx.Node, int] = {}
        self.sources: list[fx.Node] = []
        self.steps: list[tuple[str, str]] = []
        self.layers: dict[int, fx.Node] = {}  # number of the step -> weight
        self.turned: set[fx.Node] = set()

    def write(self, node: fx.Node, inside: set[fx.Node]) -> None:
        inputs = [self._id(n) for n in self._read(node)]
        if is_call(node, ATTENTION) and node.kwargs["mask"] is not None:
            inputs.append(self._mask(node.kwargs["mask"]))
        op, named = self._step(node)
        grid = grid_of(node)
        scale = None if grid is None or keeps_scale(op, named) else self._scale(grid)
        self.ids[node] = self.builder.step(op, *inputs, scale=scale, **named)
        self.steps.append((op, node.meta.get("module", "")))
        if is_call(node, *LAYERS):
            self.layers[len(self.steps) - 1] = node.kwargs["weight"]

    def output(self, node: fx.Node) -> None:
        """As [B, C, H, W] if that is how all read it."""
        outside = [user for user in node.users if user not in self.ids]
        turns = all(is_call(user, PERMUTE) and list(user.args[1]) == nhwc.NCHW for user in outside)
        if turns:
            self.turned.add(node)
        self.builder.output(self.ids[node], "nchw" if turns else "same")

    def _read(self, node: fx.Node) -> list[fx.Node]:
        if is_call(node, QUANTIZE) and self._turns(node):
            return [node.args[0].args[0]]
        if is_call(node, CONCAT):
            return list(node.kwargs["codes"])
        if is_call(node, SUM, PRODUCT):
            return [node.kwargs[name] for name in (("a", "b") if is_call(node, SUM) else ("x", "gate"))]
        return [node.kwargs["x"]] if is_call(node, POOL) else inputs_of(node)

    def _turns(self, node: fx.Node) -> bool:
        x = node.args[0]
        return is_call(x, PERMUTE) and list(x.args[1]) == nhwc.NHWC and x not in self.ids

    def _id(self, node: fx.Node) -> int:
        if node not in self.ids:
            grid = grid_of(node)
            self.ids[node] = self.builder.input(None if grid is None else self._scale(grid))
            self.sources.append(node)
        return self.ids[node]

    def _mask(self, node: fx.Node) -> int:
        """As codes, of a scale that has no meaning."""
        if node not in self.ids:
            self.ids[node] = self.builder.input(self.builder.scale(torch.ones(1), torch.zeros(1), 8))
            self.sources.append(node)
        return self.ids[node]

    def _scale(self, grid: Grid) -> Any:
        return self.builder.scale(self.constants.tensor(grid.step), self.constants.tensor(grid.zero), grid.bits)

    def _tensor(self, node: fx.Node | None) -> Any:
        return None if node is None else self.constants.tensor(node)

    def _step(self, node: fx.Node) -> tuple[str, dict[str, Any]]:
        if is_call(node, QUANTIZE):
            return "quantize", {"layout": "nchw" if self._turns(node) else "same"}
        if is_call(node, DEQUANTIZE):
            return "dequantize", {}
        if is_call(node, FLATTEN):
            return "reshape", {"shape": (0, -1)}
        if is_call(node, LOOKUP):
            return "lookup", {"table": self._tensor(node.args[1])}
        if is_call(node, SPARQ):
            _, bits, stride, round, pairs, _ = node.args
            family = next(name for name, window in FAMILIES.items() if window == (bits, stride))
            return "sparq", {"family": family, "round": int(round), "pairs": int(pairs)}
        if is_call(node, CONCAT):
            return "concat", {}
        if is_call(node, INDEX_SELECT):
            return "index_select", {"index": self._tensor(node.args[1])}
        k = node.kwargs
        if is_call(node, ATTENTION):
            return "attention", {"heads": k["heads"], "score_scale": score_bits(k["scale"])}
        if is_call(node, SUM, PRODUCT):
            return "add" if is_call(node, SUM) else "multiply", {"activation": k["activation"]}
        if is_call(node, INDEX_PUT):
            columns = {name: self._tensor(k[name]) for name in ("index", "source")}
            return "index_put", columns | {"activation": k["activation"]}
        if is_call(node, POOL):
            window = {name: tuple(k[name]) for name in WINDOW}
            flags = {"ceil_mode": int(k["ceil_mode"]), "count_include_pad": int(k["count_include_pad"])}
            if k["mode"] == "max":
                flags["count_include_pad"] = 0
            return "pool", {"mode": k["mode"], **window, **flags}
        named = {name: self._tensor(k[name]) for name in ("weight", "weight_step", "bias")}
        named |= {"bits": k["bits"], "activation": k["activation"]}
        if is_call(node, GEMM):
            return "gemm", named
        assert is_call(node, CONV2D)
        return "conv2d", named | {name: tuple(k[name]) for name in WINDOW} | {"groups": k["groups"]}
