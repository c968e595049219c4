"""What a search found, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from qk.search.choose import Chosen, Search
from qk.search.cost import Costs
from qk.search.items import Item
from qk.tables import Table

UNITS = {"size_mb": "MB of tensors", "latency_ms": "ms", "giga_bit_ops": "10^9 bit operations"}


def latency_table(items: Sequence[Item], costs: Costs) -> Table:
    """Milliseconds of each item at each pair of widths that one of them has."""
    pairs = sorted({option for item in items for option in item.options}, reverse=True)
    rows = []
    for item, own in zip(items, costs.items, strict=True):
        times = dict(zip(item.options, own, strict=True))
        rows.append([item.name, *(f"{times[pair]:.4g}" if pair in times else None for pair in pairs)])
    rows.append(["everything else", *[f"{costs.rest:.4g}"] * len(pairs)])
    return Table("Milliseconds", ["layer", *(f"W{w}A{a}" for w, a in pairs)], rows)


def chosen_tables(search: Search, chosen: Chosen) -> list[Table]:
    """The widths of each layer, and what they cost beside all layers at one pair of widths."""
    layers = [[name, spec.describe(), spec.reason] for name, spec in chosen.plan.layers.items()]
    pairs = sorted({option for item in search.items for option in item.options}, reverse=True)
    uniform = {f"all W{w}A{a}": search.uniform(w, a) for w, a in pairs}
    names = [name for name in UNITS if name in chosen.costs]
    head = ["", *(UNITS[name] for name in names)]
    rows = [
        [name, *(f"{one.costs[cost]:.4g}" for cost in names)] for name, one in [("chosen", chosen), *uniform.items()]
    ]
    if chosen.measured_ms is not None:
        rows.append(["chosen, measured", *(f"{chosen.measured_ms:.4g}" * (cost == "latency_ms") for cost in names)])
    return [Table("Widths", ["layer", "widths", "why float"], layers), Table("Costs", head, rows)]
