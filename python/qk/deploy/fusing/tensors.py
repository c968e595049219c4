"""Quantize what integer layers hand to each other: the one pass of fuse that changes numbers.

A float tensor that would lie in memory between two integer steps becomes quantize -> dequantize. What may work in
integers is decided by the graph alone: an operator does if all that it reads comes from integer layers and at least one
integer layer reads, in the end, what it makes. Tensors that only change place (pools, concatenations, reshapes) keep
the grid of what they read, so they and what they read form a class with one grid: that of a layer of 8 bits which reads
from the class, else one from the range seen on the batches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from qk import ops
from qk.calibrate.observe import Observer
from qk.calibrate.ranges import percentile, step_and_zero
from qk.deploy.fusing import heads, nhwc
from qk.deploy.fusing.graph import (
    ADD,
    ATTENTION,
    CAT,
    CONV2D,
    DEQUANTIZE,
    ENDS,
    FUNCTIONS,
    MOVES,
    MUL,
    POOLS,
    QUANTIZE,
    Constants,
    Grid,
    activation_of,
    inputs_of,
    is_call,
    only_user,
    qk,
    shape_of,
    with_shape,
)
from qk.deploy.fusing.running import run
from qk.errors import fail
from qk.inputs import describe

STAGE = "qk.fuse"
BITS = 8


class Roles:
    """Which nodes of a graph work in integers once tensors are quantized."""

    def __init__(self, graph: fx.Graph) -> None:
        self.supplied: set[fx.Node] = set()  # made by an integer layer or of codes, or from such tensors alone
        self.wanted: set[fx.Node] = set()  # read, in the end, by an integer layer
        nodes = list(graph.nodes)
        for node in nodes:
            if is_call(node, *ENDS, DEQUANTIZE) or (
                is_known(node) and all(n in self.supplied for n in operands_of(node))
            ):
                self.supplied.add(node)
        for node in reversed(nodes):
            if any(is_call(user, QUANTIZE) or self.is_integer(user) for user in node.users):
                self.wanted.add(node)

    def is_integer(self, node: fx.Node) -> bool:
        """Of operators between layers."""
        return is_known(node) and node in self.supplied and node in self.wanted


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensors whose values it computes with: a mask of attention is none."""
    return list(node.args[:3]) if is_call(node, heads.scaled_dot_product_attention) else inputs_of(node)


def is_known(node: fx.Node) -> bool:
    """Whether the operator, given codes, can be computed in integers or by a table."""
    if node.op != "call_function" or "shape" not in node.meta:
        return False
    if is_call(node, ADD):
        return _two_of_one_shape(node)
    if is_call(node, MUL):
        return _gated(node) is not None
    if is_call(node, nhwc.adaptive_avg_pool):
        size = shape_of(node.args[0])[1:3]
        return all(n % k == 0 for n, k in zip(size, node.args[1], strict=True))
    if is_call(node, CAT):
        return node.args[1] in (-1, len(shape_of(node)) - 1)
    return activation_of(node) is not None or is_call(
        node,
        *FUNCTIONS,
        *MOVES,
        nhwc.max_pool,
        nhwc.avg_pool,
        nhwc.mean,
        nhwc.batch_norm,
        heads.scaled_dot_product_attention,
    )


def _two_of_one_shape(node: fx.Node) -> bool:
    both = node.args[:2]
    return (
        all(isinstance(n, fx.Node) and n.op != "get_attr" for n in both)
        and not node.kwargs
        and shape_of(both[0]) == shape_of(both[1])
    )


def _gated(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The image and its gate [B, 1, 1, C], if the product is one of these."""
    both = node.args[:2]
    if node.kwargs or not all(isinstance(n, fx.Node) and n.op != "get_attr" for n in both):
        return None
    for x, gate in (both, both[::-1]):
        shape = shape_of(x)
        if len(shape) == 4 and shape_of(gate) == (shape[0], 1, 1, shape[3]):
            return x, gate
    return None


def moves(node: fx.Node) -> bool:
    """Whether the result has values of its input alone."""
    return is_call(node, nhwc.max_pool, CAT, *MOVES)


def quantize_tensors(constants: Constants, batches: Iterable[Any], ranges: str) -> None:
    """Rewrites the graph in place; shapes must be known. batches: what the ranges are taken from."""
    graph = constants.graph
    roles = Roles(graph)
    classes = _Classes(graph, roles)
    chosen = {tensor: classes.grid(tensor) for tensor in classes.tensors}
    _calibrate(constants, classes, chosen, batches, ranges)
    for tensor, grid in chosen.items():
        if grid is not None:
            _insert(graph, tensor, grid, roles)
    grids = {classes.key(tensor): grid for tensor, grid in chosen.items()}
    _replace(graph, constants, roles, lambda tensor: grids.get(classes.key(tensor)))


class _Classes:
    """The tensors that are read as codes, in classes of one grid."""

    def __init__(self, graph: fx.Graph, roles: Roles) -> None:
        self.roles = roles
        self.parent: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if roles.is_integer(node) and moves(node):
                for source in inputs_of(node):
                    self.parent[self._root(source)] = self._root(node)
        self.by_root: dict[fx.Node, list[fx.Node]] = {}
        moved = {*self.parent, *self.parent.values()}
        for node in graph.nodes:
            if node in moved:
                self.by_root.setdefault(self._root(node), []).append(node)
        fused = _fused_edges(graph, roles)
        read = {
            source
            for node in graph.nodes
            if roles.is_integer(node)
            for source in operands_of(node)
            if (source, node) not in fused
        }
        # A class is quantized where it is made: what moves has the codes already, and so has what a module quantizes.
        made = [node for node in graph.nodes if node in read and not is_call(node, DEQUANTIZE)]
        self.tensors = [node for node in made if not (roles.is_integer(node) and moves(node))]

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parent.get(node, node) is not node:
            self.parent[node] = self.parent.get(self.parent[node], self.parent[node])
            node = self.parent[node]
        return node

    def members(self, tensor: fx.Node) -> list[fx.Node]:
        """In the order of the graph: ties are broken alike in every run."""
        return self.by_root.get(self._root(tensor), [tensor])

    def key(self, tensor: fx.Node) -> fx.Node:
        return self._root(tensor)

    def grid(self, tensor: fx.Node) -> Grid | str | None:
        """A layer's grid; "range" where one has to be found; None where every reader is the same quantizer, which then
        takes the place of the class by itself."""
        quantizers: Counter[Grid] = Counter()
        others = 0
        for member in self.members(tensor):
            for user in member.users:
                if is_call(user, QUANTIZE):
                    quantizers[Grid(*user.args[1:])] += len(user.users)
                elif self.roles.is_integer(user) and not moves(user):
                    others += 1
        if others == 0 and len(quantizers) == 1:
            return None
        wide = [grid for grid in quantizers if grid.bits == BITS]
        return max(wide, key=quantizers.__getitem__) if wide else "range"


def _fused_edges(graph: fx.Graph, roles: Roles) -> set[tuple[fx.Node, fx.Node]]:
    """(maker, reader) whose tensor never reaches memory: the reader is part of the maker's last step."""
    fused = set()
    for node in graph.nodes:
        if not roles.is_integer(node):
            continue
        if is_call(node, ADD):
            # A sum belongs to the layer that makes one of its operands.
            maker = next((n for n in node.args[:2] if is_call(n, *ENDS) and only_user(n, node)), None)
            if maker is not None:
                fused.add((maker, node))
        elif activation_of(node) is not None:
            maker = node.args[0]
            ends = is_call(maker, *ENDS, ADD, MUL, nhwc.batch_norm)
            if only_user(maker, node) and (ends or _on_codes(maker)):
                fused.add((maker, node))
        elif _on_codes(node) and only_user(node.args[0], node) and _on_codes(node.args[0]):
            fused.add((node.args[0], node))
    return fused


def _on_codes(node: fx.Node) -> bool:
    """Functions of one value."""
    return is_call(node, *FUNCTIONS)


# --- ranges ---------------------------------------------------------------------------------------------------------


def _calibrate(
    constants: Constants,
    classes: _Classes,
    chosen: dict[fx.Node, Any],
    batches: Iterable[Any],
    ranges: str,
) -> None:
    """Puts a grid in the place of every "range" in chosen."""
    observers = {classes.key(t): Observer(t.name) for t, grid in chosen.items() if grid == "range"}
    if not observers:
        return
    watched = {t: observers[classes.key(t)] for t, grid in chosen.items() if grid == "range"}

    def watch(node: fx.Node, value: Any) -> None:
        if node in watched:
            watched[node].see(value)

    for i, batch in enumerate(batches):
        try:
            run(constants, batch, watch)
        except RuntimeError as error:
            got = f"{describe(batch)}, on which it raised {type(error).__name__}: {error}".splitlines()[0]
            raise fail(
                STAGE, f"batch {i} of example", "input of the first one's sizes but for the batch", got
            ) from error
    grids: dict[fx.Node, Grid] = {}
    for tensor, observer in watched.items():
        key = classes.key(tensor)
        if key not in grids:
            if not observer.is_finite or not observer.seen:
                where = f"the batches, where they reach {tensor.meta.get('module') or tensor.name},"
                raise fail(STAGE, where, "finite", "NaN or infinity" if not observer.is_finite else "no data")
            low, high = torch.tensor([observer.low]), torch.tensor([observer.high])
            found = step_and_zero(low, high, BITS) if ranges == "minmax" else percentile(observer.sample(), BITS)
            grids[key] = Grid(*(constants.scalar(t.to(constants.device)) for t in found), BITS)
        chosen[tensor] = grids[key]


# --- the pairs and what reads them ----------------------------------------------------------------------------------


def _insert(graph: fx.Graph, tensor: fx.Node, grid: Grid, roles: Roles) -> None:
    """quantize -> dequantize between a tensor and what reads it in integers; other readers keep the float tensor."""
    readers = [user for user in tensor.users if is_call(user, QUANTIZE) or roles.is_integer(user)]
    with graph.inserting_after(tensor):
        codes = with_shape(graph.call_function(QUANTIZE, (tensor, grid.step, grid.zero, grid.bits)), tensor)
    with graph.inserting_after(codes):
        values = with_shape(graph.call_function(DEQUANTIZE, (codes, grid.step, grid.zero)), tensor)
    for user in readers:
        user.replace_input_with(tensor, values)


def _replace(graph: fx.Graph, constants: Constants, roles: Roles, grid_for: Callable[[fx.Node], Grid | None]) -> None:
    """Functions of codes become tables of values, averages sums of codes, BatchNorms depthwise layers on codes."""
    for node in list(graph.nodes):
        maker = _maker(node) if roles.is_integer(node) else None
        if maker is None:
            continue
        with graph.inserting_before(node):
            sources = operands_of(node) if maker is _attention else node.args[:1]
            operands = [_codes(graph, source, grid_for) for source in sources]
            if None in operands:
                continue
            new = maker(graph, constants, node, *itertools.chain(*operands))
        node.replace_all_uses_with(with_shape(new, node))
        graph.erase_node(node)


def _maker(node: fx.Node) -> Callable[..., fx.Node] | None:
    if _on_codes(node) or activation_of(node):
        return _table
    if is_call(node, *POOLS):
        return _average
    if is_call(node, heads.scaled_dot_product_attention):
        return _attention
    return _scaled if is_call(node, nhwc.batch_norm) else None


def _codes(graph: fx.Graph, x: fx.Node, grid_for: Callable[[fx.Node], Grid | None]) -> tuple[fx.Node, Grid] | None:
    """The codes of a tensor and their grid. What was moved lies on the grid that it had: quantize finds its codes."""
    if is_call(x, DEQUANTIZE):
        return x.args[0], Grid(x.args[1], x.args[2], BITS)
    grid = grid_for(x) if moves(x) else None
    if grid is None:
        return None
    return with_shape(graph.call_function(QUANTIZE, (x, grid.step, grid.zero, grid.bits)), x), grid


def _table(graph: fx.Graph, constants: Constants, node: fx.Node, codes: fx.Node, grid: Grid) -> fx.Node:
    table = table_of(node, constants.tensor(grid.step), constants.tensor(grid.zero))
    return graph.call_function(qk.lookup.default, (codes, constants.add("table", table)))


def table_of(node: fx.Node, step: Tensor, zero: Tensor) -> Tensor:
    """A function of one value at all codes, as torch computes it for these 256 values, and for no other place in a
    vector: its kernels differ between them."""
    return node.target(all_values(step, zero), *node.args[1:], **node.kwargs).contiguous()


def all_values(step: Tensor, zero: Tensor) -> Tensor:
    """The values of the codes 0 to 255."""
    return ops.dequantize(torch.arange(256, dtype=torch.uint8, device=step.device), step, zero)


def _average(graph: fx.Graph, constants: Constants, node: fx.Node, codes: fx.Node, grid: Grid) -> fx.Node:
    height, width = shape_of(codes)[1:3]
    window = {"kernel": [height, width], "padding": [0, 0], "ceil_mode": False, "count_include_pad": True}
    window |= {"stride": [height, width], "divisor_override": None}
    if is_call(node, nhwc.adaptive_avg_pool):
        size = [height // node.args[1][0], width // node.args[1][1]]
        window |= {"kernel": size, "stride": size}
    elif is_call(node, nhwc.avg_pool):
        names = ("kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        window |= dict(zip(names, node.args[1:], strict=True))
    kwargs = {"x": codes, "x_step": grid.step, "x_zero": grid.zero, "mode": "average", **window}
    rest = {"dilation": [1, 1], "activation": "none", "out_step": None, "out_zero": None, "out_bits": BITS}
    return graph.call_function(qk.pool.default, (), kwargs | rest)


def _attention(graph: fx.Graph, constants: Constants, node: fx.Node, *operands: Any) -> fx.Node:
    """operands: codes and grid of q, k and v."""
    kwargs: dict[str, Any] = {}
    for name, codes, grid in zip("qkv", operands[::2], operands[1::2], strict=True):
        kwargs |= {name: codes, f"{name}_step": grid.step, f"{name}_zero": grid.zero}
    mask, count, scale = node.args[3:]
    kwargs |= {"heads": count, "mask": mask, "scale": scale, "out_step": None, "out_zero": None, "out_bits": BITS}
    return graph.call_function(ATTENTION, (), kwargs)


def factor_and_shift(constants: Constants, tensors: Iterable[fx.Node], eps: float) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in eval mode multiplies channels with, float64, and adds, float32. tensors: weight, bias, mean
    and variance."""
    weight, bias, mean, var = (constants.tensor(n).detach().double() for n in tensors)
    factor = weight / (var + eps).sqrt()
    return factor, (bias - mean * factor).float()


def _scaled(graph: fx.Graph, constants: Constants, node: fx.Node, codes: fx.Node, grid: Grid) -> fx.Node:
    """BatchNorm as a depthwise 1x1 layer: the weight of a channel is +1 or -1, its step the factor's size."""
    factor, shift = factor_and_shift(constants, node.args[1:5], node.args[5])
    channels = factor.numel()
    step = torch.where(factor == 0, 1.0, factor.abs()).float().clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.full((channels,), 128, dtype=torch.int32, device=factor.device)
    signs = (128 + factor.sign()).to(torch.uint8).reshape(channels, 1)
    prepacked = ops.prepack(ops.pack(signs, 8), zero, 8, (channels, 1, 1, 1), channels)
    named = {"weight": prepacked, "weight_step": step, "bias": shift}
    tensors = {name: constants.add(name, tensor) for name, tensor in named.items()}
    sizes = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": channels}
    ends = {"activation": "none", "out_step": None, "out_zero": None, "out_bits": BITS}
    ends |= {"residual": None, "residual_step": None, "residual_zero": None}
    operand = {"x": codes, "x_step": grid.step, "x_zero": grid.zero, "x_bits": grid.bits}
    return graph.call_function(CONV2D, (), operand | tensors | {"bits": 8} | sizes | ends)
