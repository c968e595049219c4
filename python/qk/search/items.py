"""What is chosen: layers that take their widths together, and the widths that each may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import get_args

from qk.errors import fail
from qk.prepare.plan import check_patterns, last_layers, too_long
from qk.prepare.prepared import Prepared
from qk.search.problem import STAGE
from qk.spec import ActivationBits, Plan, QuantSpec, WeightBits

Widths = tuple[int, int]  # of weights and of activations


@dataclass(frozen=True)
class Item:
    """Layers that read one tensor, and so have one activation width: they are chosen as one, as in the papers.

    options: from the widest to the narrowest, weights first.
    """

    layers: tuple[str, ...]
    options: tuple[Widths, ...]

    @property
    def name(self) -> str:
        return "+".join(self.layers)


def find_items(
    p: Prepared,
    weights: Sequence[int],
    activations: Sequence[int],
    tied: bool,
    keep: Sequence[str] | None,
) -> list[Item]:
    """Every quantized layer that is not kept, in running order, linked ones together.

    keep: name patterns of layers that stay as p.plan has them, and with them what they are linked to; None: the first
    layer and the last ones. Widths that could overflow a layer's sums are none of its options.
    Raises QkError for widths that no kernel has, patterns that match nothing, and when nothing is left to choose.
    """
    options = _options(weights, activations, tied)
    layers = p.quant_layers()
    if keep is not None:
        check_patterns("keep", keep, p.layers)
        kept = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in keep)}
    else:
        kept = {*list(p.layers)[:1], *last_layers(p.layers)} & layers.keys()
    group_of = {name: group for group in p.links for name in group}
    items, seen = [], set()
    for name in layers:
        group = tuple(n for n in group_of.get(name, (name,)) if n in layers)
        if name in seen or kept & set(group):
            continue
        seen |= set(group)
        if special := [n for n in group if not _is_plain(p.plan[n])]:
            expected = "a plan of plain codes, without points, sparq or the grid mid-rise"
            got = ", ".join(f"{n} {p.plan[n].describe()}" for n in special)
            raise fail(STAGE, "p", expected, got, "Prepare it without; add them to the plan that is found.")
        possible = [o for o in options if not any(too_long(p.layers[n], with_widths(p.plan[n], o)) for n in group)]
        if not possible:
            raise fail(STAGE, "weights and activations", f"widths that {name} can have", f"{options}")
        items.append(Item(group, tuple(possible)))
    if not items:
        raise fail(STAGE, "p", "a model with a quantized layer to choose for", f"none beside {', '.join(kept)}")
    return items


def with_widths(spec: QuantSpec, widths: Widths) -> QuantSpec:
    """The spec with other widths, and no reason to be float."""
    return replace(spec, weights=widths[0], activations=widths[1], reason="")


def plan_of(p: Prepared, items: Sequence[Item], choice: Sequence[int]) -> Plan:
    """p's plan with the option of that number for each item."""
    chosen = {
        name: with_widths(p.plan[name], item.options[number])
        for item, number in zip(items, choice, strict=True)
        for name in item.layers
    }
    return Plan(p.plan.layers | chosen)


def _is_plain(spec: QuantSpec) -> bool:
    return spec.points == 1 and spec.sparq is None and spec.grid == "mid-tread"


def _options(weights: Sequence[int], activations: Sequence[int], tied: bool) -> list[Widths]:
    for what, given, allowed in (("weights", weights, WeightBits), ("activations", activations, ActivationBits)):
        possible = get_args(allowed)
        if not given or len(set(given)) < len(given) or not set(given) <= set(possible):
            raise fail(STAGE, what, f"different widths of {', '.join(map(str, possible))}", list(given))
    if tied:
        if len(weights) != len(activations):
            got = f"{len(weights)} and {len(activations)}"
            raise fail(STAGE, "weights and activations", "as many of each where they are tied", got)
        options = list(zip(weights, activations, strict=True))
    else:
        options = [(w, a) for w in weights for a in activations]
    return sorted(options, reverse=True)
