"""Graphs without operators that write in place: relu for relu_ and so on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qk.deploy.fusing.graph import AS_IT_IS, aten
from qk.errors import fail

NOTHING = (  # what changes no value in eval mode
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
VIEWS = (
    *NOTHING,
    *(aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor),
    *(aten.expand.default, aten.contiguous.default, aten.split.Tensor, aten.chunk.default, operator.getitem),
)


def functional(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Without operators that write in place. Those on values that nobody reads again are simply replaced, which takes
    no time; for the rest torch follows every alias."""
    module = program.module(check_guards=False)
    if _without_writes(module.graph):
        return module
    program = program.run_decompositions({})
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        advice = AS_IT_IS
        raise fail("qk.fuse", "model", "free of state that its forward changes", ", ".join(changed), advice)
    return program.module(check_guards=False)


def _without_writes(graph: fx.Graph) -> bool:
    """Replaces relu_ by relu and so on; False if what was written would be read again under another name."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _writes(node):
            continue
        target, twin = node.args[0], _functional_twin(node)
        first = _memory_of(target)
        if twin is None or first.op != "call_function":
            return False
        others = [n for n in order if order[n] < order[node] and n is not target and _memory_of(n) is first]
        if any(order[user] > order[node] for other in others for user in other.users):
            return False
        node.target = twin
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    graph.lint()
    return True


def _writes(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _functional_twin(node: fx.Node) -> Any:
    name, _, overload = node.target._name.removeprefix("aten::").partition(".")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, overload or "default", None)


def _memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one may be a view of."""
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node
