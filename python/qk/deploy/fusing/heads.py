"""Attention between integer layers: one operator on rows as layers make them, heads side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qk.deploy.fusing.graph import aten, is_call, shape_of, with_shape
from qk.ops.attention import LONGEST_DEPTH, MOST_KEYS

SDPA = aten.scaled_dot_product_attention.default
SHAPES = (aten.view.default, aten.reshape.default)
TURNS = (aten.transpose.int, aten.permute.default)
SAME = (*SHAPES, aten.contiguous.default, aten.clone.default)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, scale: float
) -> Tensor:
    """In float: q, k, v [B, rows, heads * D], mask [B or 1, queries or 1, keys] -> [B, queries, heads * E]."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    seen = None if mask is None else (mask != 0).unsqueeze(1)
    return F.scaled_dot_product_attention(*split, attn_mask=seen, scale=scale).transpose(1, 2).flatten(2)


def seen(mask: Tensor) -> Tensor:
    """A mask that is the same for all heads, as the operator takes it: uint8 [B or 1, queries or 1, keys]."""
    return mask[(None,) * (4 - mask.dim())][:, 0].to(torch.uint8)


def has_attention(graph: fx.Graph) -> bool:
    return any(is_call(node, SDPA) for node in graph.nodes)


def join_heads(graph: fx.Graph) -> None:
    """Puts the function above in the place of every attention whose heads are cut out of rows and put back together,
    with what cuts and joins them. In place; shapes must be known, of a batch of more than one: torch repeats q, k and v
    of a batch of one, the operator does not."""
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
            new = with_shape(graph.call_function(scaled_dot_product_attention, args), shape_of(joined), node)
        joined.replace_all_uses_with(new)
    for node in reversed(list(graph.nodes)):
        if not node.users and is_call(node, SDPA, *TURNS, *SAME):
            graph.erase_node(node)


def _match(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float, fx.Node] | None:
    """q, k and v as rows, the mask, the scale, and the node of the joined result."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        return None
    q, k, v = (given[name].meta.get("shape", ()) for name in names[:3])
    if len(q) != 4 or len(k) != 4 or (*q[:2], k[2], q[3]) != k or v[:3] != k[:3] or len(v) != 4:
        return None
    scale = given.get("scale")
    scale = 1 / math.sqrt(q[3]) if scale is None else float(scale)
    mask = given.get("attn_mask")
    if k[2] > MOST_KEYS or q[3] > LONGEST_DEPTH or not 1e-30 < scale < 1e30 or not _is_for_all_heads(mask, q, k[2]):
        return None
    rows, joined = [_rows(given[name]) for name in names[:3]], _joined(node)
    return None if None in rows or joined is None else (rows, mask, scale, joined)


def _is_for_all_heads(mask: fx.Node | None, queries: tuple[int, ...], keys: int) -> bool:
    if mask is None:
        return True
    batch, _, rows, _ = queries
    sizes = mask.meta.get("shape", ())
    if mask.meta.get("dtype") != torch.bool or not 2 <= len(sizes) <= 4:
        return False
    images, heads, lines, width = (1,) * (4 - len(sizes)) + sizes
    return images in (1, batch) and heads == 1 and lines in (1, rows) and width == keys


def _turns_heads(node: fx.Node) -> bool:
    """[B, a, b, C] <-> [B, b, a, C]."""
    if is_call(node, aten.permute.default):
        return [axis % 4 for axis in node.args[1]] == [0, 2, 1, 3]
    return is_call(node, aten.transpose.int) and {axis % 4 for axis in node.args[1:]} == {1, 2}


def _rows(x: fx.Node) -> fx.Node | None:
    """[B, rows, heads * D] that x [B, heads, rows, D] was cut out of."""
    if not _turns_heads(x) or not is_call(x.args[0], *SHAPES):
        return None
    batch, heads, rows, depth = shape_of(x)
    whole = x.args[0].args[0]
    fits = shape_of(x.args[0]) == (batch, rows, heads, depth) and whole.meta.get("shape") == (
        batch,
        rows,
        heads * depth,
    )
    return whole if fits else None


def _joined(node: fx.Node) -> fx.Node | None:
    """What puts the result's heads side by side."""
    batch, heads, rows, width = shape_of(node)
    turned = _reader(node, _turns_heads)
    whole = (batch, rows, heads * width)
    return turned and _reader(turned, lambda reader: is_call(reader, *SHAPES) and shape_of(reader) == whole)


def _reader(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The only one, behind others that change nothing, if it is wanted."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if wanted(reader):
            return reader
        if not is_call(reader, *SAME) or shape_of(reader) != shape_of(node):
            return None
        node = reader
    return None
