"""SPARQ: what the inputs of layers look like to it, and a window for each layer by the error that it makes.

Source: Shomron et al., Post-Training Sparsity-Aware Quantization (2021). The cut is in qk.ops.sparq, its place in front
of a layer in qk.prepare.windows. Windows by layer are an extension: the paper has one for the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qk import ops
from qk.calibrate.batches import call, hold
from qk.errors import fail
from qk.inputs import evaluating
from qk.ops.sparq import FAMILIES
from qk.ops.sparq_pack import shift_bits
from qk.prepare.insert import QuantLayer, to_kernel_order
from qk.prepare.prepared import Prepared, check_calibrated
from qk.prepare.windows import check_sparse, cut_codes, why_whole
from qk.spec import Plan, Sparq, Window

STAGE = "qk.choose_windows"
WHOLE = 8.0  # bits of a code that is not cut
SMALL = 16  # what fits 4 bits without a shift
UNITS = 4096  # in which a budget is spent
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
        layer, zero = self.layer, int(self.layer.input.zero)
        groups = 1 if layer.conv_args is None else layer.conv_args["groups"]
        last = x if layer.conv_args is None else x.movedim(-3, -1)
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
        reason = why_whole(self.sparq, int(self.layer.input.zero), self.layer.weight.shape[1])
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


def set_windows(p: Prepared, windows: dict[str, Sparq | None]) -> None:
    """Gives quantized layers of p other windows, or none, in place; steps and codes stay.

    Raises QkError for a name that is no quantized layer, activations of another width than 8, and pairs by weights that
    are not 2:4 sparse; p is unchanged then.
    """
    layers = p.quant_layers()
    unknown = [name for name in windows if name not in layers]
    if unknown:
        raise fail("qk.set_windows", "windows", "for quantized layers", ", ".join(unknown))
    by_weights = [name for name, sparq in windows.items() if sparq is not None and sparq.pairs == "weights"]
    check_sparse({name: to_kernel_order(layers[name].weight.detach()) for name in by_weights}, "qk.set_windows")
    specs = {name: replace(p.plan[name], sparq=sparq) for name, sparq in windows.items()}
    p.plan = Plan(p.plan.layers | specs)
    for name, spec in specs.items():
        layers[name].spec = spec


@dataclass(frozen=True)
class Choice:
    """One layer's window, None for whole codes. bits: a value costs. error: of its output, as a share of its power."""

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
    input stays whole take no part. The error of a layer is that of its output on the float model's input, as a share of
    the output's power; errors of layers are added. batches, memory_mb: as for reconstruct; p is calibrated.
    Sets p's plan in place, as set_windows does, and returns what was chosen. Codes of weights stay: reconstruct comes
    after it. Raises QkError when no layer can be cut, and for a budget that no choice meets.
    """
    held = _checked(p, batches, STAGE, memory_mb)
    if cost not in get_args(Cost):
        raise fail(STAGE, "cost", f"one of {', '.join(get_args(Cost))}", repr(cost))
    layers = {name: layer for name, layer in _with_windows(p).items() if layer.cuts is not None}
    if not layers:
        reasons = {
            name: why_whole(layer.spec.sparq, int(layer.input.zero), layer.weight.shape[1])
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

    Exact but for a unit of the budget each, of which there are UNITS above what the cheapest options need. Raises
    QkError for a budget that these exceed.
    """
    total = sum(amounts.values())
    least = {name: min(c.bits for c in options[name]) for name in options}
    floor = sum(least[name] * n for name, n in amounts.items())
    room = bits * total * (1 + 1e-9) - floor
    if room < 0:
        raise fail(STAGE, "bits", f"at least {floor / total:.3g}, what the narrowest windows need", bits)
    best = {name: min(all_, key=lambda c: (c.error, c.bits)) for name, all_ in options.items()}
    if sum((best[name].bits - least[name]) * n for name, n in amounts.items()) <= room:
        return best
    # errors[u]: the least sum so far with at most u units spent; taken: which option of a name that takes.
    errors, taken = np.zeros(UNITS + 1), {}
    spent = {
        name: [math.ceil((c.bits - least[name]) * amounts[name] / max(room, 1e-9) * UNITS) for c in all_]
        for name, all_ in options.items()
    }
    for name, all_ in options.items():
        sums = np.full((len(all_), UNITS + 1), np.inf)
        for i, (option, units) in enumerate(zip(all_, spent[name], strict=True)):
            if units <= UNITS:
                sums[i, units:] = errors[: UNITS + 1 - units] + option.error
        taken[name], errors = sums.argmin(0), sums.min(0)
    chosen, left = {}, UNITS
    for name in reversed(list(options)):
        i = taken[name][left]
        chosen[name], left = options[name][i], left - spent[name][i]
    return {name: chosen[name] for name in options}


def _errors(p: Prepared, layers: dict[str, QuantLayer], held: list[Any]) -> dict[str, dict[Window | None, float]]:
    """Layer -> window (None: whole codes) -> error of its output on the float model's input, over its power."""
    windows = (None, *get_args(Window))
    noise = {name: dict.fromkeys(windows, 0.0) for name in layers}
    power = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable:
        def see(layer: QuantLayer, args: tuple, kwargs: dict, output: Tensor) -> None:
            power[name] += float(output.double().square().sum())
            for window in windows:
                with _as_if(layer, window):
                    found = layer.forward(*args, **kwargs)
                noise[name][window] += float((found.double() - output.double()).square().sum())

        return see

    with ExitStack() as stack, p.quantized(set()), evaluating(p.model):
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name), with_kwargs=True).remove)
        for index, batch in enumerate(held):
            call(p, batch, index, STAGE)
    return {
        name: {window: n / power[name] if power[name] else 0.0 for window, n in by.items()}
        for name, by in noise.items()
    }


@contextmanager
def _as_if(layer: QuantLayer, window: Window | None):
    """The layer quantized, with this window, for a while."""
    spec, sparq = layer.spec, layer.spec.sparq
    layer.spec = replace(spec, sparq=window and replace(sparq, window=window))
    layer.quantized = True
    try:
        yield
    finally:
        layer.spec, layer.quantized = spec, False


def _with_windows(p: Prepared) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in p.quant_layers().items() if layer.spec.sparq is not None}


def _values(p: Prepared, name: str) -> int:
    """Values of the layer's input, on the example."""
    return torch.Size(p.layers[name].input_shape).numel() * p.layers[name].calls


def _checked(p: Prepared, batches: Iterable, stage: str, memory_mb: int = 1024) -> list[Any]:
    check_calibrated(p, stage)
    return hold(batches, stage, None, memory_mb)
