"""Exact fusion: a graph that computes the same bits with fewer operators (docs/fuse.md has the reasons)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qk import ops
from qk.deploy.fusing import nhwc
from qk.deploy.fusing.graph import (
    ADD,
    ATTENTION,
    CAT,
    DEQUANTIZE,
    ENDS,
    GEMM,
    INDEX_PUT,
    LAYERS,
    MOVES,
    MUL,
    QUANTIZE,
    Constants,
    Grid,
    activation_of,
    grid_of,
    is_call,
    merge_equal,
    only_user,
    qk,
    shape_of,
    with_shape,
)
from qk.deploy.fusing.tensors import all_values

LOOKUP, POOL, CONCAT = qk.lookup.default, qk.pool.default, qk.concat.default
SUM, PRODUCT = qk.add.default, qk.multiply.default


def fuse_exactly(constants: Constants) -> None:
    """Rewrites the graph in place until nothing changes. Shapes must be known (running.note_shapes)."""
    graph = constants.graph
    changed = True
    while changed:
        merge_equal(graph)
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            with graph.inserting_before(node):
                changed |= any(rule(graph, node, constants) for rule in RULES)
        _drop_unused(graph)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _put(node: fx.Node, new: fx.Node) -> bool:
    """new in the place of node."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _values(node: fx.Node) -> dict[str, fx.Node | None]:
    """An operand as the operators on codes take it: codes with step and zero, or float32 with neither."""
    if is_call(node, DEQUANTIZE):
        return {"": node.args[0], "_step": node.args[1], "_zero": node.args[2]}
    return {"": node, "_step": None, "_zero": None}


def _named(name: str, node: fx.Node) -> dict[str, fx.Node | None]:
    return {name + end: value for end, value in _values(node).items()}


_OPEN = {"activation": "none", "out_step": None, "out_zero": None, "out_bits": 8}


def _takes_end(node: fx.Node) -> bool:
    """Whether the operator ends in values that it could also quantize."""
    if is_call(node, INDEX_PUT) and not (is_call(node.kwargs["x"], *LAYERS) and only_user(node.kwargs["x"], node)):
        return False
    return is_call(node, *ENDS, SUM, PRODUCT, POOL, ATTENTION) and node.kwargs["out_step"] is None and not _is_max(node)


def _is_max(node: fx.Node) -> bool:
    return is_call(node, POOL) and node.kwargs["mode"] == "max"


def _ended(graph: fx.Graph, maker: fx.Node, end: dict[str, Any]) -> fx.Node:
    """A copy with an end. Columns that are put, and what they are put into, end alike."""
    kwargs = maker.kwargs | end
    if is_call(maker, INDEX_PUT):
        kwargs |= {"x": _ended(graph, maker.kwargs["x"], end)}
    new = graph.call_function(maker.target, (), kwargs)
    new.meta = dict(maker.meta)
    return new


# --- rules: each returns whether it changed the graph -----------------------------------------------------------------


def activation_into_its_maker(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """Both are float32 and elementwise: the same values, one pass."""
    name, maker = activation_of(node), node.args[0] if node.args else None
    if name is None or not is_call(maker, *ENDS, SUM, PRODUCT) or not only_user(maker, node):
        return False
    if not _takes_end(maker) or maker.kwargs["activation"] != "none":
        return False
    return _put(node, _ended(graph, maker, {"activation": name}))


def sum_into_a_layer(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """The epilogue adds its residual as the sum would: the layer's float32 result plus the other's value."""
    if not is_call(node, ADD) or len(node.args) != 2 or node.kwargs:
        return False
    for maker, other in (node.args, node.args[::-1]):
        if not isinstance(other, fx.Node) or not is_call(maker, *ENDS) or not only_user(maker, node):
            continue
        is_open = _takes_end(maker) and maker.kwargs["activation"] == "none" and maker.kwargs["residual"] is None
        if is_open and shape_of(maker) == other.meta.get("shape") and other is not maker and _is_float(other):
            return _put(node, _ended(graph, maker, _named("residual", other)))
    return False


def _is_float(node: fx.Node) -> bool:
    return node.meta.get("dtype", torch.float32) == torch.float32


def sum_of_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """add takes codes as values; at least one of the operands lies in codes, and no layer could take the sum."""
    if not is_call(node, ADD) or len(node.args) != 2 or node.kwargs:
        return False
    a, b = node.args
    if not all(isinstance(n, fx.Node) and n.op != "get_attr" and _is_float(n) for n in (a, b)):
        return False
    if not any(is_call(n, DEQUANTIZE) for n in (a, b)) or shape_of(a) != shape_of(b):
        return False
    new = graph.call_function(SUM, (), _named("a", a) | _named("b", b) | _OPEN)
    return _put(node, with_shape(new, node))


def product_of_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """An image in codes times one value for each channel."""
    if not is_call(node, MUL) or node.kwargs or not all(isinstance(n, fx.Node) for n in node.args):
        return False
    for x, gate in (node.args, node.args[::-1]):
        shape = x.meta.get("shape", ())
        if is_call(x, DEQUANTIZE) and len(shape) == 4 and gate.meta.get("shape") == (shape[0], 1, 1, shape[3]):
            new = graph.call_function(PRODUCT, (), _named("x", x) | _named("gate", gate) | _OPEN)
            return _put(node, with_shape(new, node))
    return False


def quantize_into_its_maker(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """The last step of an epilogue is quantize itself."""
    if not is_call(node, QUANTIZE) or not _takes_end(node.args[0]) or not only_user(node.args[0], node):
        return False
    maker, step, zero, bits = node.args
    return _put(node, _ended(graph, maker, {"out_step": step, "out_zero": zero, "out_bits": bits}))


def codes_to_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """quantize of a function of codes is a table of 256 codes; of the codes' own grid, nothing."""
    if not is_call(node, QUANTIZE) or not is_call(node.args[0], DEQUANTIZE, LOOKUP):
        return False
    x, grid = node.args[0], Grid(*node.args[1:])
    if is_call(x, LOOKUP) and grid_of(x) is not None:
        return False
    codes = x.args[0]
    values = all_values(*map(constants.tensor, x.args[1:])) if is_call(x, DEQUANTIZE) else constants.tensor(x.args[1])
    table = _quantized(constants, values, grid)
    source = grid_of(codes)
    if is_call(x, DEQUANTIZE) and source is not None:
        used = torch.arange(2**source.bits, dtype=torch.uint8, device=table.device)
        if torch.equal(table[: len(used)], used) and _same_scale(source, grid):
            return _put(node, codes)
    new = with_shape(graph.call_function(LOOKUP, (codes, constants.add("table", table))), node)
    new.meta["grid"] = grid
    return _put(node, new)


def _same_scale(a: Grid, b: Grid) -> bool:
    return (a.step, a.zero) == (b.step, b.zero)


def _quantized(constants: Constants, values: Tensor, grid: Grid) -> Tensor:
    return ops.quantize(values, constants.tensor(grid.step), constants.tensor(grid.zero), grid.bits)


def max_pool_of_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """Quantize and dequantize are monotone: the largest value has the largest code."""
    if not is_call(node, nhwc.max_pool):
        return False
    x, *window = node.args
    kwargs = dict(zip(("kernel", "stride", "padding", "dilation", "ceil_mode"), window, strict=True))
    kwargs |= {"mode": "max", "count_include_pad": False, "divisor_override": None} | _OPEN
    if is_call(x, DEQUANTIZE):
        codes, step, zero = x.args
        pooled = with_shape(graph.call_function(POOL, (), kwargs | {"x": codes, "x_step": step, "x_zero": zero}), node)
        return _put(node, with_shape(graph.call_function(DEQUANTIZE, (pooled, step, zero)), node))
    reader = _only_quantize(node)
    if reader is None:
        return False
    codes = with_shape(graph.call_function(QUANTIZE, (x, *reader.args[1:])), x)
    grid = dict(zip(("x_step", "x_zero"), reader.args[1:3], strict=True))
    return _put(reader, with_shape(graph.call_function(POOL, (), kwargs | {"x": codes} | grid), node))


def _only_quantize(node: fx.Node) -> fx.Node | None:
    """What reads the node, if that is one quantize."""
    reader = next(iter(node.users), None)
    return reader if len(node.users) == 1 and is_call(reader, QUANTIZE) else None


def concat_of_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """Elementwise: tensors may be quantized before they are put together."""
    if not is_call(node, CAT) or node.args[1] not in (-1, len(shape_of(node)) - 1):
        return False
    parts, reader = node.args[0], _only_quantize(node)
    on_codes = [p for p in parts if is_call(p, DEQUANTIZE)]
    if reader is not None:
        made = [(p.args[0], p.args[1:]) if p in on_codes else _quantize(graph, p, reader) for p in parts]
        new = _concat(graph, node, made, Grid(*reader.args[1:]))
        return _put(reader, new)
    grids = {p.args[1:] for p in parts} if len(on_codes) == len(parts) else set()
    if len(grids) != 1:
        return False
    (step, zero), bits = grids.pop(), max(_bits(p.args[0]) for p in parts)
    new = _concat(graph, node, [(p.args[0], p.args[1:]) for p in parts], Grid(step, zero, bits))
    return _put(node, with_shape(graph.call_function(DEQUANTIZE, (new, step, zero)), node))


def _bits(codes: fx.Node) -> int:
    grid = grid_of(codes)
    return 8 if grid is None else grid.bits


def _quantize(graph: fx.Graph, x: fx.Node, reader: fx.Node) -> tuple[fx.Node, tuple]:
    return with_shape(graph.call_function(QUANTIZE, (x, *reader.args[1:])), x), reader.args[1:3]


def _concat(graph: fx.Graph, node: fx.Node, parts: list[tuple[fx.Node, tuple]], grid: Grid) -> fx.Node:
    kwargs = {"codes": [p[0] for p in parts], "steps": [p[1][0] for p in parts], "zeros": [p[1][1] for p in parts]}
    kwargs |= {"out_step": grid.step, "out_zero": grid.zero, "out_bits": grid.bits}
    return with_shape(graph.call_function(CONCAT, (), kwargs), node)


def move_codes(graph: fx.Graph, node: fx.Node, constants: Constants) -> bool:
    """Elementwise: quantize before, dequantize after values change place."""
    if not is_call(node, *MOVES) or "shape" not in node.meta:
        return False
    x, *how = node.args
    if is_call(x, DEQUANTIZE):
        codes, step, zero = x.args
        moved = with_shape(graph.call_function(node.target, (codes, *how), dict(node.kwargs)), node)
        return _put(node, with_shape(graph.call_function(DEQUANTIZE, (moved, step, zero)), node))
    reader = _only_quantize(node)
    if reader is None or not _comes_from_layer(x):
        return False
    codes = with_shape(graph.call_function(QUANTIZE, (x, *reader.args[1:])), x)
    return _put(reader, with_shape(graph.call_function(node.target, (codes, *how), dict(node.kwargs)), node))


def _comes_from_layer(x: fx.Node) -> bool:
    """Whether a quantize would end in an epilogue."""
    while len(x.users) == 1 and (is_call(x, *MOVES, nhwc.max_pool) or activation_of(x)):
        x = x.args[0]
    return len(x.users) == 1 and (_takes_end(x) or is_call(x, CAT, ADD, MUL))


RULES: tuple[Callable[[fx.Graph, fx.Node, Constants], bool], ...] = (
    activation_into_its_maker,
    sum_into_a_layer,
    sum_of_codes,
    product_of_codes,
    quantize_into_its_maker,
    codes_to_codes,
    max_pool_of_codes,
    concat_of_codes,
    move_codes,
)


def read_images_as_they_lie(graph: fx.Graph, repack: Callable[[fx.Node, tuple[int, ...]], fx.Node | None]) -> None:
    """A layer that reads a flattened image reads it as it lies (NHWC) when its weight's columns are put in that order:
    an integer sum has no order."""
    for node in list(graph.nodes):
        if not is_call(node, GEMM):
            continue
        flat = node.kwargs["x"]
        if not (is_call(flat, *MOVES) and len(shape_of(flat)) == 2 and only_user(flat, node)):
            continue
        turned = flat.args[0]
        if not is_call(turned, MOVES[0]) or list(turned.args[1]) != nhwc.NCHW:
            continue
        weight = repack(node, shape_of(turned.args[0])[1:])
        if weight is None:
            continue
        with graph.inserting_before(flat):
            kept = graph.call_function(torch.ops.aten.flatten.using_ints, (turned.args[0], 1))
        flat.replace_all_uses_with(with_shape(kept, flat))
        node.kwargs = node.kwargs | {"weight": weight}
    _drop_unused(graph)
