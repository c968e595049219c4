"""Layers that read the same tensor: they share one quantizer, hence one activation width."""

from __future__ import annotations

from dataclasses import replace

from qk.prepare.observe import Observation, Value
from qk.prepare.prepared import Layer
from qk.spec import Plan


def find_links(seen: Observation, layers: dict[str, Layer]) -> list[tuple[str, ...]]:
    """Groups of two or more layers, in running order. A layer that runs twice links the readers of both its inputs."""
    group_of: dict[str, list[str]] = {}
    first_reader: dict[Value, str] = {}
    for name in layers:
        group_of[name] = [name]
        for call in seen.calls[name]:
            other = group_of[first_reader.setdefault(call.inputs[0], name)]
            if other is not group_of[name]:
                other += group_of[name]
                for member in group_of[name]:
                    group_of[member] = other
    groups = {id(group): sorted(group, key=list(layers).index) for group in group_of.values() if len(group) > 1}
    return [tuple(group) for group in groups.values()]


def agree(plan: Plan, links: list[tuple[str, ...]]) -> Plan:
    """The plan with the widest activation width of each group given to all of the group that is quantized."""
    specs = dict(plan.layers)
    for group in links:
        quantized = [name for name in group if not specs[name].is_float]
        widest = max((specs[name].activations for name in quantized), default=None)
        for name in quantized:
            specs[name] = replace(specs[name], activations=widest)
    return Plan(specs)
