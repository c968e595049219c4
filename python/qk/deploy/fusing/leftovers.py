"""What fuse leaves in float, and why: for the report."""

from __future__ import annotations

import operator

from torch import fx, nn

from qk.deploy.fusing.graph import MOVES, ROWS, aten, is_call, is_dynamic
from qk.deploy.fusing.heads import seen
from qk.deploy.fusing.tensors import Roles, is_known

WEIGHTED = (aten.conv2d.default, aten.linear.default, aten.embedding.default)
PLAIN = (  # bookkeeping, no work worth a line
    *(operator.getitem, aten.sym_size.int, aten.arange.default, aten.slice.Tensor, aten.select.int),
    *(aten.expand.default, aten.new_ones.default, aten.contiguous.default, aten.clone.default),
    seen,
)


def note_reasons(graph: fx.Graph, model: nn.Module, tensors: int | None) -> None:
    """Why each operator would stay in float, to be asked when it did. graph: before tensors are quantized."""
    roles = Roles(graph)
    for node in graph.nodes:
        if _works_on_floats(node):
            node.meta["reason"] = _reason(node, roles, model, tensors)


def left_in_float(graph: fx.Graph) -> list[tuple[str, str]]:
    """(module and operator, reason) in running order, for what stands between the integer regions of a fused graph."""
    found = []
    for node in graph.nodes:
        if _works_on_floats(node):
            module, name = node.meta.get("module", ""), name_of(node)
            found.append((f"{module}: {name}" if module else name, node.meta.get("reason", "stays in float")))
    return found


def _works_on_floats(node: fx.Node) -> bool:
    return is_dynamic(node) or (
        node.op == "call_function"
        and not is_call(node, *MOVES, *PLAIN)
        and not str(node.target).startswith("qk.")
        and bool(node.all_input_nodes)
    )


def _reason(node: fx.Node, roles: Roles, model: nn.Module, tensors: int | None) -> str:
    if is_dynamic(node):
        return "each row of its input has a step of its own, which no fused step finds"
    if is_call(node, *WEIGHTED):
        info = getattr(model, "qk_info", None)
        kept = {} if info is None else info.kept
        return kept.get(node.meta.get("module", ""), "it is in float")
    if not is_known(node):
        return f"{name_of(node)} has no integer form here"
    if node not in roles.supplied:
        return "reads values that no integer layer made"
    if node not in roles.wanted:
        by_rows = any(is_call(user, ROWS) for user in node.users)
        return "what reads it finds a step for each row" if by_rows else "no integer layer reads what it makes"
    return "tensors=None leaves what it reads in float" if tensors is None else "stays in float"


def name_of(node: fx.Node) -> str:
    return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
