"""Puts a plan into the model: a QuantLayer where a layer is quantized, the float layer where it is not."""

from __future__ import annotations

from torch import nn

from qk.prepare.blocks import quantized_units
from qk.prepare.insert import ActQuantizer, QuantLayer, to_kernel_order
from qk.prepare.plan import checked
from qk.prepare.prepared import Prepared
from qk.prepare.rows import RowQuantizer
from qk.prepare.tree import replace_module
from qk.prepare.windows import check_sparse
from qk.spec import Plan, float_spec


def apply_plan(p: Prepared, plan: Plan) -> None:
    """Gives the model of `p` the widths of `plan`. Steps and codes start anew: calibrate afterwards.

    Raises QkError, before anything changes, for a plan that names an unknown layer, leaves one out, quantizes nothing,
    asks for what no kernel can run, or pairs activations by weights that are not 2:4 sparse.
    """
    plan = checked(plan, p.layers, p.links, "qk.apply_plan", bool(p.tables))
    by_weights = [name for name, spec in plan.layers.items() if spec.sparq and spec.sparq.pairs == "weights"]
    check_sparse({name: to_kernel_order(p.originals[name].weight.detach()) for name in by_weights}, "qk.apply_plan")
    group_of = {name: group for group in p.links for name in group}
    quantizers: dict[tuple[tuple[str, ...], bool], ActQuantizer | RowQuantizer] = {}
    for name, original in p.originals.items():
        spec, new = plan[name], original
        if not spec.is_float:
            shared = group_of.get(name, (name,)), spec.dynamic
            if shared not in quantizers:
                kind = RowQuantizer if spec.dynamic else ActQuantizer
                quantizers[shared] = kind(spec.activations).to(original.weight.device)
            new = QuantLayer(original, spec, quantizers[shared]).train(p.model.training)
        put(p, name, new)
    _record(p, plan)
    p.calibrated, p.history = False, {}


def leave_in_float(p: Prepared, reasons: dict[str, str]) -> None:
    """Puts the float layers of these names back, each with its reason; every other one keeps its steps and codes.

    Raises QkError, before anything changes, for a name that is no layer, and when nothing would be quantized any more.
    """
    specs = p.plan.layers | {name: float_spec(reason) for name, reason in reasons.items()}
    plan = checked(
        Plan(specs), p.layers, [], "qk.leave_in_float", bool(p.tables)
    )  # a link keeps the width that it was calibrated for
    for name in reasons:
        put(p, name, p.originals[name])
    _record(p, plan)


def put(p: Prepared, name: str, module: nn.Module) -> None:
    """Puts a module in the place of layer `name`, wherever the model holds that."""
    if name:
        replace_module(p.model, p.model.get_submodule(name), module)
    else:  # the model is itself a layer
        p.model = module


def _record(p: Prepared, plan: Plan) -> None:
    """Makes what p says about itself follow from the plan."""
    p.plan = plan
    p.units, p.stages = quantized_units(p.all_units, plan), quantized_units(p.all_stages, plan)
    in_float = {name: spec.reason or "the plan says so" for name, spec in plan.layers.items() if spec.is_float}
    p.kept = {name: reason for name, reason in p.kept.items() if name not in p.layers} | in_float
