"""Puts a plan into the model: a QuantLayer where a layer is quantized, the float layer where it is not."""

from __future__ import annotations

from qk.prepare.blocks import quantized_units
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.plan import checked
from qk.prepare.prepared import Prepared
from qk.prepare.tree import replace_module
from qk.spec import Plan


def apply_plan(p: Prepared, plan: Plan) -> None:
    """Gives the model of `p` the widths of `plan`. Steps and codes start anew: calibrate afterwards.

    Raises QkError, before anything changes, for a plan that names an unknown layer, leaves one out, quantizes nothing,
    or asks for what no kernel can run.
    """
    plan = checked(plan, p.layers, p.links, "qk.apply_plan")
    group_of = {name: group for group in p.links for name in group}
    quantizers: dict[tuple[str, ...], ActQuantizer] = {}
    for name, original in p.originals.items():
        spec, new = plan[name], original
        if not spec.is_float:
            group = group_of.get(name, (name,))
            if group not in quantizers:
                quantizers[group] = ActQuantizer(spec.activations).to(original.weight.device)
            new = QuantLayer(original, spec, quantizers[group]).train(p.model.training)
        replace_module(p.model, p.model.get_submodule(name), new)
    p.plan = plan
    p.units = quantized_units(p.all_units, plan)
    in_float = {name: spec.reason or "the plan says so" for name, spec in plan.layers.items() if spec.is_float}
    p.kept = {name: reason for name, reason in p.kept.items() if name not in p.layers} | in_float
    p.calibrated, p.history = False, {}
