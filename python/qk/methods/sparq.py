"""SPARQ: what the inputs of layers look like to it, and a window for each layer by the error that it makes.

Source: Shomron et al., Post-Training Sparsity-Aware Quantization (2021). The cut is in qk.ops.sparq, its place in front
of a layer in qk.prepare.windows. Windows by layer are an extension: the paper has one for the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qk import ops
from qk.calibrate.batches import call, hold, unpadded
from qk.calibrate.objective import first_tensor
from qk.errors import fail
from qk.inputs import evaluating
from qk.ops.sparq import FAMILIES
from qk.ops.sparq_pack import shift_bits
from qk.options import Sparq, Window
from qk.prepare.insert import QuantLayer, to_kernel_order
from qk.prepare.prepared import Prepared, check_calibrated
from qk.prepare.windows import check_sparse, cut_codes, why_whole
from qk.spec import Plan

STAGE = "qk.choose_windows"
WHOLE = 8.0  # bits of a code that is not cut
SMALL = 16  # what fits 4 bits without a shift
UNITS = 4096
Cost = Literal["stored", "multiplied"]


def shifts_of(window: Window) -> range:
    """The shifts at which the window may lie."""
    bits, stride = FAMILIES[window]
    return range(0, 8 - bits + 1, stride)


def stored_bits(sparq: Sparq) -> float:
    """Bits of a value at rest: its window, where that lies, and half of the bit that says how its pair shares them."""
    family = FAMILIES[sparq.window]
    return family[0] + shift_bits(*family) + (0.0 if sparq.pairs == "none" else 0.5)


def multiplied_bits(sparq: Sparq) -> float:
    """Bits of a value in the multiplier."""
    return float(FAMILIES[sparq.window][0])


def shift_of(distance: Tensor, window: Window) -> Tensor:
    """The smallest allowed shift that keeps the top bit. distance: codes' distances from zero, whole numbers."""
    bits, stride = FAMILIES[window]
    shift = torch.zeros_like(distance)
    for s in shifts_of(window)[1:]:
        shift = torch.where(distance >= 2 ** (bits + s - stride), s, shift)
    return shift


# --- what a layer's input looks like ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputStatistics:
    """The 8-bit codes in front of one layer, over calibration data; without padding. These shares predict the loss.

    window: what they are cut to, or "whole", and `reason` says why. zeros: share of values that are 0. one_zero: share
    of pairs of neighbouring channels in which exactly one is. small: share of values within 16 codes of 0. wide: share
    of the values other than 0 that stand beside one. shifts: shift -> share of the values other than 0 that have it.
    sqnr_db: power of the codes over power of what cutting moves them by. bits: of a value at rest.
    """

    window: str
    reason: str
    zeros: float
    one_zero: float
    small: float
    wide: float
    shifts: dict[int, float]
    sqnr_db: float
    bits: float

    @staticmethod
    def of(data: dict[str, Any]) -> InputStatistics:
        """From JSON, whose keys are text."""
        return InputStatistics(**data | {"shifts": {int(s): share for s, share in data["shifts"].items()}})


class _Counts:
    """Sums over the codes that one layer is shown."""

    def __init__(self, layer: QuantLayer) -> None:
        self.layer, self.sparq = layer, layer.spec.sparq
        self.values = self.zeros = self.pairs = self.one_zero = self.small = self.wide = 0
        self.shifts = dict.fromkeys(shifts_of(self.sparq.window), 0)
        self.power = self.moved = 0.0

    def see(self, x: Tensor) -> None:
        layer, zero = self.layer, self.layer.input.zero_point
        groups = 1 if layer.conv_args is None else layer.conv_args["groups"]
        taken = layer.taken(x)
        last = taken if layer.conv_args is None else taken.movedim(-3, -1)
        codes = ops.quantize(last, layer.input.step, layer.input.zero, 8)
        distance = (codes.int() - zero).abs().unflatten(-1, (groups, -1))
        own = distance.shape[-1]
        is_zero = F.pad(distance == 0, (0, own % 2), value=True).unflatten(-1, (-1, 2))
        alone = is_zero.flip(-1).flatten(-2)[..., :own]  # beside a 0
        some = distance > 0
        self.values += distance.numel()
        self.zeros += int((~some).sum())
        self.pairs += is_zero[..., 0].numel()
        self.one_zero += int((is_zero.sum(-1) == 1).sum())
        self.small += int((distance < SMALL).sum())
        self.wide += int((some & alone).sum())
        shift = shift_of(distance, self.sparq.window)[some]
        for s in self.shifts:
            self.shifts[s] += int((shift == s).sum())
        self.power += float(distance.double().square().sum())
        if layer.cuts is not None:
            plain = replace(self.sparq, pairs="channels") if self.sparq.pairs == "weights" else self.sparq
            cut = cut_codes(codes, plain, groups, layer.input.zero if zero else None)
            self.moved += float((cut.double() - codes.double()).square().sum())

    def shares(self) -> InputStatistics:
        some = max(1, self.values - self.zeros)
        reason = why_whole(self.sparq, self.layer.input.zero_point, self.layer.weight.shape[1])
        return InputStatistics(
            window="whole" if reason else self.sparq.window,
            reason=reason,
            zeros=self.zeros / self.values,
            one_zero=self.one_zero / self.pairs,
            small=self.small / self.values,
            wide=self.wide / some,
            shifts={s: n / some for s, n in self.shifts.items()},
            sqnr_db=10 * math.log10(self.power / self.moved) if self.moved else math.inf,
            bits=WHOLE if reason else stored_bits(self.sparq),
        )


@torch.no_grad()
def input_statistics(p: Prepared, batches: Iterable) -> dict[str, InputStatistics]:
    """Of every layer whose plan has windows, in running order, with the whole model quantized.

    Raises QkError for p that is not calibrated, and for bad batches. With pairs by weights, where every output channel
    has its own, wide and sqnr_db are those of pairs by channels.
    """
    held = _checked(p, batches, "qk.input_statistics")
    counts = {name: _Counts(layer) for name, layer in _with_windows(p).items()}
    if not counts:  # nobody would look
        return {}

    def watch(name: str) -> Callable:
        return lambda layer, args, kwargs: counts[name].see(layer.taken(*args, **kwargs))

    with ExitStack() as stack, p.quantized(), evaluating(p.model):
        for name, count in counts.items():
            hook = count.layer.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(hook.remove)
        for index, batch in enumerate(held):
            call(p, batch, index, "qk.input_statistics")
    return {name: count.shares() for name, count in counts.items() if count.values}


# --- a window for each layer -----------------------------------------------------------------------------------------


def set_windows(p: Prepared, windows: dict[str, Sparq | Window | None]) -> None:
    """Gives quantized layers of p other windows, or none, in place; steps and codes stay.

    windows: by layer a Sparq, the name of a window for its other defaults, or None for whole codes.
    Raises QkError for a name that is no quantized layer, activations of another width than 8, and pairs by weights that
    are not 2:4 sparse; p is unchanged then.
    """
    layers = p.quant_layers()
    unknown = [name for name in windows if name not in layers]
    if unknown:
        raise fail("qk.set_windows", "windows", "for quantized layers", ", ".join(unknown))
    for name, given in windows.items():
        if given is not None and not isinstance(given, Sparq) and given not in get_args(Window):
            expected = f"a qk.Sparq, None, or one of {', '.join(get_args(Window))}"
            raise fail("qk.set_windows", f"windows[{name!r}]", expected, repr(given))
    windows = {name: Sparq(window=given) if isinstance(given, str) else given for name, given in windows.items()}
    by_weights = [name for name, sparq in windows.items() if sparq is not None and sparq.pairs == "weights"]
    check_sparse({name: to_kernel_order(layers[name].weight.detach()) for name in by_weights}, "qk.set_windows")
    specs = {name: replace(p.plan[name], sparq=sparq) for name, sparq in windows.items()}
    p.plan = Plan(p.plan.layers | specs)
    for name, spec in specs.items():
        layers[name].spec = spec


@dataclass(frozen=True)
class Choice:
    """One layer's window, None for whole codes. bits: of a value. error: squared change of the model's output, as a
    share of its power."""

    window: Window | None
    bits: float
    error: float


@torch.no_grad()
def choose_windows(
    p: Prepared, batches: Iterable, bits: float, cost: Cost = "stored", memory_mb: int = 1024
) -> dict[str, Choice]:
    """Gives each layer of p that has windows the one with which all of them together err least within a budget.

    bits: what a value may cost on average. cost: "stored", its bits at rest with what says where its window lies, each
    layer counted by its input values; "multiplied", bits in the multiplier, counted by multiplications. Layers whose
    input stays whole take no part. The error of a window in a layer is what it changes in the quantized model's output
    with all other inputs whole, squared; errors of layers are added. That takes a pass over the batches for each layer
    and window: a few dozen samples do. memory_mb: as for reconstruct.
    Sets p's plan in place, as set_windows does, and returns what was chosen. Codes of weights stay: reconstruct comes
    after it. Raises QkError for p that is not calibrated, a budget that no choice meets, an output whose shape changes,
    and when no layer can be cut.
    """
    held = _checked(p, batches, STAGE, memory_mb)
    if not isinstance(bits, int | float):
        raise fail(STAGE, "bits", "a number", repr(bits))
    if cost not in get_args(Cost):
        raise fail(STAGE, "cost", f"one of {', '.join(get_args(Cost))}", repr(cost))
    layers = {name: layer for name, layer in _with_windows(p).items() if layer.cuts is not None}
    if not layers:
        reasons = {
            name: why_whole(layer.spec.sparq, layer.input.zero_point, layer.weight.shape[1])
            for name, layer in _with_windows(p).items()
        }
        got = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no layer with sparq in its plan"
        raise fail(STAGE, "p", "a model with a layer whose input can be cut", got)
    errors = _errors(p, layers, held)
    price = stored_bits if cost == "stored" else multiplied_bits
    options = {
        name: [
            Choice(window, WHOLE if window is None else price(replace(layer.spec.sparq, window=window)), error)
            for window, error in errors[name].items()
        ]
        for name, layer in layers.items()
    }
    amounts = {name: _values(p, name) if cost == "stored" else p.layers[name].macs for name in layers}
    chosen = within_budget(options, amounts, bits)
    sparqs = {name: layer.spec.sparq for name, layer in layers.items()}
    set_windows(p, {name: c.window and replace(sparqs[name], window=c.window) for name, c in chosen.items()})
    return chosen


def within_budget(options: dict[str, list[Choice]], amounts: dict[str, int], bits: float) -> dict[str, Choice]:
    """For each name the option with which the sum of errors is least and the mean of bits, by amounts, within `bits`.

    Of all combinations of the options so far, those of like cost (in the same of UNITS parts of what the budget leaves
    above the cheapest options) compete, and the one of least error stays. Raises QkError for a budget that the cheapest
    options exceed.
    """
    total = sum(amounts.values())
    least = {name: min(c.bits for c in all_) for name, all_ in options.items()}
    floor = sum(least[name] * n for name, n in amounts.items())
    room = bits * total * (1 + 1e-9) - floor
    if room < 0:
        raise fail(STAGE, "bits", f"at least {floor / total:.3g}, what the narrowest windows need", bits)
    spent, errors = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each name: what a combination chose, and what it extends
    for name, all_ in options.items():
        own = np.array([(c.bits - least[name]) * amounts[name] for c in all_])
        cost, error = np.add.outer(own, spent), np.add.outer([c.error for c in all_], errors)
        choice, parent = np.indices(cost.shape)
        fits = cost <= room
        cost, error, choice, parent = (x[fits] for x in (cost, error, choice, parent))
        part = np.floor(cost / max(room, 1e-9) * UNITS)
        order = np.lexsort((error, part))
        _, first = np.unique(part[order], return_index=True)
        kept = order[first]
        spent, errors = cost[kept], error[kept]
        steps.append((choice[kept], parent[kept]))
    at, chosen = int(errors.argmin()), {}
    for name, (choice, parent) in reversed(list(zip(options, steps, strict=True))):
        chosen[name], at = options[name][choice[at]], parent[at]
    return {name: chosen[name] for name in options}


def _errors(p: Prepared, layers: dict[str, QuantLayer], held: list[Any]) -> dict[str, dict[Window | None, float]]:
    """Layer -> window -> squared change of the model's output, as a share of its power; None (whole codes): none."""
    specs = {name: layer.spec for name, layer in layers.items()}

    def outputs() -> Iterator[Tensor]:
        found = (first_tensor(call(p, batch, i, STAGE), STAGE) for i, batch in enumerate(held))
        return (unpadded(batch, output).double() for batch, output in zip(held, found, strict=True))

    def change() -> float:
        total = 0.0
        for found, whole in zip(outputs(), expected, strict=True):
            if found.shape != whole.shape:
                raise fail(STAGE, "the model's output", f"{list(whole.shape)} whatever is cut", list(found.shape))
            total += float((found - whole).square().sum())
        return total

    errors: dict[str, dict[Window | None, float]] = {name: {None: 0.0} for name in layers}
    try:
        for name, layer in layers.items():
            layer.spec = replace(specs[name], sparq=None)
        with p.quantized(), evaluating(p.model):
            expected = list(outputs())
            power = sum(float(whole.square().sum()) for whole in expected) or 1.0
            for name, layer in layers.items():
                for window in get_args(Window):
                    layer.spec = replace(specs[name], sparq=replace(specs[name].sparq, window=window))
                    errors[name][window] = change() / power
                layer.spec = replace(specs[name], sparq=None)
    finally:
        for name, layer in layers.items():
            layer.spec = specs[name]
    return errors


def _with_windows(p: Prepared) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in p.quant_layers().items() if layer.spec.sparq is not None}


def _values(p: Prepared, name: str) -> int:
    """Values of the layer's input, on the example."""
    return torch.Size(p.layers[name].input_shape).numel() * p.layers[name].calls


def _checked(p: Prepared, batches: Iterable, stage: str, memory_mb: int = 1024) -> list[Any]:
    check_calibrated(p, stage)
    return hold(batches, stage, None, memory_mb)
