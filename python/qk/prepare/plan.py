"""From a recipe to a plan, and what a plan must satisfy before a kernel can run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from qk.errors import fail
from qk.prepare.links import agree
from qk.prepare.prepared import Layer
from qk.prepare.source import STAGE
from qk.prepare.windows import FOUR
from qk.spec import Plan, QuantSpec, Recipe, float_spec

INT32_MAX = 2**31 - 1


def plan_from(
    recipe: Recipe,
    layers: Mapping[str, Layer],
    links: list[tuple[str, ...]],
    others: Iterable[str] = (),
    may_be_float: bool = False,
) -> Plan:
    """The recipe's widths for each layer; a layer whose sums could leave int32 stays in float.

    others: names that skip may match too. may_be_float: as in checked.
    Raises QkError for a pattern of skip or overrides that matches nothing, for a group size that does not fit, and for
    overrides that make the input of a convolution dynamic.
    """
    check_patterns("skip", recipe.skip, [*layers, *others])
    check_patterns("overrides", recipe.overrides, layers)
    names = list(layers)
    ends = {*names[:1], *last_layers(layers)}
    plan = agree(Plan({n: recipe.spec_for(n, n in ends, n in names[1:2], layers[n].kind) for n in names}), links)
    long = {n: reason for n in names if (reason := too_long(layers[n], plan[n]))}
    plan = Plan({n: float_spec(long[n]) if n in long else spec for n, spec in plan.layers.items()})
    return checked(plan, layers, links, STAGE, may_be_float)


def last_layers(layers: Mapping[str, Layer]) -> list[str]:
    """Those whose outputs no layer reads; where a loop leaves none, the last to run."""
    return [name for name, layer in layers.items() if not layer.feeds] or list(layers)[-1:]


def checked(
    plan: Plan, layers: Mapping[str, Layer], links: list[tuple[str, ...]], stage: str, may_be_float: bool = False
) -> Plan:
    """The plan in running order with linked layers agreed. may_be_float: a plan that quantizes no layer is one too, as
    there are tables that are. Raises QkError for what no kernel could run."""
    unknown, missing = [n for n in plan.layers if n not in layers], [n for n in layers if n not in plan.layers]
    if unknown or missing:
        what = f"unknown {', '.join(unknown)}" if unknown else f"nothing for {', '.join(missing)}"
        raise fail(stage, "plan", "one spec for each layer of the model", what, "Its layers are in Prepared.layers.")
    plan = agree(Plan({n: plan[n] for n in layers}), links)
    if not may_be_float and all(spec.is_float for spec in plan.layers.values()):
        reasons = sorted({spec.reason or "the plan says so" for spec in plan.layers.values()})
        raise fail(stage, "plan", "one that quantizes a layer", f"float for all: {'; '.join(reasons)}")
    uneven = [
        f"{spec.group_size} for {n} with K = {length(layers[n])}"
        for n, spec in plan.layers.items()
        if not spec.is_float and spec.group_size is not None and length(layers[n]) % spec.group_size
    ]
    if uneven:
        expected = "a divisor of K, which is kh * kw * C / groups or the input features"
        raise fail(stage, "group_size", expected, ", ".join(uneven), "Give them another one, or null, in overrides.")
    images = [n for n, spec in plan.layers.items() if spec.dynamic and layers[n].kind != "linear"]
    if images:
        advice = "A convolution reads many pixels at once and has one step for all."
        raise fail(stage, "dynamic", "false for what is no Linear", f"true for {', '.join(images)}", advice)
    long = [f"{n}: {reason}" for n in layers if (reason := too_long(layers[n], plan[n]))]
    if long:
        advice = "Use fewer bits, or leave it in float."
        raise fail(stage, "plan", "one whose sums stay in int32", "; ".join(long), advice)
    return plan


def length(layer: Layer) -> int:
    """K: how many products one output sums."""
    k = 1
    for n in layer.weight_shape[1:]:
        k *= n
    return k


def too_long(layer: Layer, spec: QuantSpec) -> str | None:
    """Why the sum of one output (of one group of it) could leave int32 at the worst codes; None if it cannot."""
    if spec.is_float:
        return None
    k = spec.group_size or length(layer)
    if spec.sparq is not None and spec.sparq.pairs == "weights":
        k *= FOUR  # the kernel sees every value in four versions
    worst_weight = 128 if spec.code_bits == 8 else 2**spec.storage_bits - 1
    most = INT32_MAX // ((2**spec.activations - 1) * worst_weight)
    return f"K = {k} could overflow int32 at {spec.describe()}; it holds up to {most}" if k > most else None


def check_patterns(field: str, patterns: Iterable[str], names: Iterable[str], kind: str = "layers") -> None:
    """Raises QkError for a pattern of the recipe's field that matches none of the names, which are of this kind."""
    names = list(names)
    idle = [repr(p) for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if idle:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise fail(STAGE, f"recipe.{field}", f"patterns that match {kind}", ", ".join(idle), f"The {kind}: {some}.")
