"""Attention between integer layers: one operator on rows as layers make them, heads side by side."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qk.deploy.fusing.graph import aten, is_call, only_user, shape_of, with_shape

SDPA = aten.scaled_dot_product_attention.default
SHAPES = (aten.view.default, aten.reshape.default)
SAME = (*SHAPES, aten.contiguous.default, aten.clone.default)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float) -> Tensor:
    """In float: q, k, v [B, rows, heads * D], mask [B or 1, queries or 1, keys] -> [B, queries, heads * E]."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    seen = None if mask is None else (mask != 0).unsqueeze(1)
    return F.scaled_dot_product_attention(*split, attn_mask=seen, scale=scale).transpose(1, 2).flatten(2)


def seen(mask: Tensor) -> Tensor:
    """A mask that is the same for all heads, as the operator takes it: uint8 [B or 1, queries or 1, keys]."""
    return mask[(None,) * (4 - mask.dim())][:, 0].to(torch.uint8)


def score_bits(scale: float) -> int:
    """The scale as programs have it: the bits of its float32."""
    return struct.unpack("<i", struct.pack("<f", scale))[0]


def join_heads(graph: fx.Graph) -> None:
    """Puts `attention` in the place of every scaled_dot_product_attention whose heads are cut out of rows and put back
    together, with what cuts and joins them. In place; shapes must be known."""
    masks: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if is_call(node, SDPA)]:
        found = _match(node)
        if found is None:
            continue
        rows, mask, scale, joined = found
        with graph.inserting_before(node):
            if mask is not None and mask not in masks:
                masks[mask] = graph.call_function(seen, (mask,))
            args = (*rows, masks.get(mask), shape_of(node)[1], scale)
            new = with_shape(graph.call_function(attention, args), shape_of(joined), node)
        new.meta["dtype"] = torch.float32
        joined.replace_all_uses_with(new)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and is_call(node, SDPA, aten.transpose.int, *SAME):
            graph.erase_node(node)


def _match(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float, fx.Node] | None:
    """q, k and v as rows, the mask, the scale, and the node of the joined result."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa") or "shape" not in node.meta:
        return None
    mask = given.get("attn_mask")
    if mask is not None and not _is_for_all_heads(mask):
        return None
    rows = [_rows(given[name]) for name in names[:3]]
    joined = _joined(node)
    if joined is None or any(x is None for x in rows):
        return None
    scale = given.get("scale")
    return rows, mask, 1 / math.sqrt(shape_of(given["query"])[-1]) if scale is None else float(scale), joined


def _is_for_all_heads(mask: fx.Node) -> bool:
    shape = mask.meta.get("shape", ())
    return mask.meta.get("dtype") == torch.bool and 2 <= len(shape) <= 4 and (len(shape) < 3 or shape[-3] == 1)


def _rows(x: Any) -> fx.Node | None:
    """[B, rows, heads * D] that x [B, heads, rows, D] was cut out of."""
    if not is_call(x, aten.transpose.int) or {axis % 4 for axis in x.args[1:]} != {1, 2}:
        return None
    cut = x.args[0]
    if not is_call(cut, *SHAPES) or len(shape_of(cut)) != 4:
        return None
    batch, rows, heads, depth = shape_of(cut)
    return cut.args[0] if cut.args[0].meta.get("shape") == (batch, rows, heads * depth) else None


def _joined(node: fx.Node) -> fx.Node | None:
    """What puts the result's heads side by side: transpose, then a view; before each, maybe, what changes nothing."""
    batch, heads, rows, width = shape_of(node)
    for target, shape in ((aten.transpose.int, (batch, rows, heads, width)), (SHAPES, (batch, rows, heads * width))):
        for reader in _readers(node):
            node = reader
            if is_call(reader, *(target if isinstance(target, tuple) else (target,))) and shape_of(reader) == shape:
                break
        else:
            return None
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Its only reader, and as long as that changes nothing but the shape, the next."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if not is_call(reader, aten.transpose.int, *SAME) or not only_user(node, reader):
            return
        yield reader
        if shape_of(reader) != shape_of(node):
            return
        node = reader
