"""What fuse leaves in float, and why: for the report."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qk.deploy.fusing.graph import MOVES, aten, is_call
from qk.deploy.fusing.tensors import Roles, is_known

WEIGHTED = (aten.conv2d.default, aten.linear.default, aten.convolution.default, aten.addmm.default)
PLAIN = (  # bookkeeping, no work worth a line
    *(aten.sym_size.int, aten.arange.default, aten.slice.Tensor, aten.select.int, aten.expand.default),
    *(aten.new_ones.default, aten.ge.Scalar, aten.__and__.Tensor, aten.contiguous.default, aten.clone.default),
)


def left_in_float(graph: fx.Graph, model: nn.Module, tensors: int | None) -> list[tuple[str, str]]:
    """(module, reason) in running order, for operators on floats that stay between integer regions."""
    roles = Roles(graph)
    info = getattr(model, "qk_info", None)
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or "shape" not in node.meta or is_call(node, *MOVES, *PLAIN):
            continue
        if str(node.target).startswith("qk.") or roles.is_integer(node) or not node.all_input_nodes:
            continue
        module = node.meta.get("module", "")
        name = module or name_of(node)
        reason = info.kept.get(module) if info is not None and is_call(node, *WEIGHTED) else None
        found.setdefault(f"{module}: {name_of(node)}" if module else name, reason or _reason(node, roles, tensors))
    return list(found.items())


def _reason(node: fx.Node, roles: Roles, tensors: int | None) -> str:
    if is_call(node, *WEIGHTED):
        return "left in float by the plan"
    if not is_known(node):
        return f"{name_of(node)} has no integer kernel"
    if node not in roles.supplied:
        return "reads values that no integer layer made"
    if node not in roles.wanted:
        return "no integer layer reads what it makes"
    return "tensors between layers stay in float (tensors=None)" if tensors is None else "stays in float"


def name_of(node: fx.Node) -> str:
    return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))

