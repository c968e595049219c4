"""Calibration: the first choice of every step and zero, from data and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import get_args

import torch
from torch import Tensor

from qk.calibrate import ranges as find
from qk.calibrate.batches import call, take
from qk.calibrate.observe import HistogramObserver, Observer
from qk.errors import fail
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.prepared import Prepared, check_prepared
from qk.spec import Ranges

__all__ = ["RANGES", "calibrate"]

RANGES = get_args(Ranges)
STAGE = "qk.calibrate"


@torch.no_grad()
def calibrate(p: Prepared, batches: Iterable, ranges: Ranges = "mse", max_batches: int | None = None) -> None:
    """Sets step and zero of every quantizer of p, in place, and the codes of the weights to the nearest ones.

    The float model runs once over the batches (tensors, tuples of positional arguments, or dicts of keywords). Memory
    is bounded: exact ends and a sample of 2^18 values (kl: 2048 counts) for each tensor, spread over all batches.
    ranges: "minmax" clips nothing; "percentile" keeps 99.99 %; "mse" minimizes the error to the power 2.4; "kl" clips
    activations by the divergence of histograms, and takes mse for the weights.
    max_batches: by default a list or DataLoader is consumed whole and an iterable of unknown length up to 64 batches.
    Raises QkError for no batch, a batch that the model does not take, a NaN or infinity in the data or in a weight, and
    a model without a quantized layer. p is unchanged then.
    """
    check_prepared(p, STAGE)
    if ranges not in RANGES:
        raise fail(STAGE, "ranges", f"one of {', '.join(RANGES)}", repr(ranges))
    layers = p.quant_layers()
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in p.kept.items())
        raise fail(STAGE, "p", "a model with a quantized layer", f"none ({reasons})")
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise fail(STAGE, f"the weight of {name}", "finite", "NaN or infinity")
    observers = _observe(p, layers, batches, HistogramObserver if ranges == "kl" else Observer, max_batches)
    for quantizer, observer in observers.items():
        quantizer.set_range(*_activation_range(observer, quantizer.bits, ranges))
    for layer in layers.values():
        layer.set_weight_range(*weight_range(layer, ranges))
    p.calibrated, p.history = True, {}  # what was learned went with the codes


def weight_range(layer: QuantLayer, ranges: str) -> tuple[Tensor, Tensor]:
    """Step and zero for each of layer.weight_rows()."""
    choose = {"minmax": find.minmax, "percentile": find.percentile}.get(ranges, find.mse)
    return choose(layer.weight_rows(), layer.spec.weights, layer.spec.weight_symmetric)


def _activation_range(observer: Observer, bits: int, ranges: str) -> tuple[Tensor, Tensor]:
    low, high = torch.tensor([observer.low]), torch.tensor([observer.high])
    if ranges == "minmax":
        return find.step_and_zero(low, high, bits)
    if ranges == "percentile":
        return find.percentile(observer.sample(), bits)
    if isinstance(observer, HistogramObserver):
        return find.kl(observer.counts, observer.width, observer.low, observer.high, bits)
    return find.mse(observer.sample(), bits, low=low, high=high, ends=observer.low < 0 < observer.high)


def _observe(
    p: Prepared, layers: dict[str, QuantLayer], batches: Iterable, kind: type[Observer], max_batches: int | None
) -> dict[ActQuantizer, Observer]:
    """One observer for each distinct quantizer, at the input of the first layer that has it: linked layers read the
    same tensor."""
    observers: dict[ActQuantizer, Observer] = {}
    was_training = p.model.training
    with ExitStack() as stack, p.quantized(set()):
        stack.callback(p.model.train, was_training)
        p.model.eval()
        for name, layer in layers.items():
            if layer.input not in observers:
                observer = observers[layer.input] = kind(name)
                handle = layer.register_forward_pre_hook(_sees(observer), with_kwargs=True)
                stack.callback(handle.remove)
        for index, batch in enumerate(take(batches, STAGE, max_batches)):
            call(p, batch, index, STAGE)
            spoilt = next((o.name for o in observers.values() if not o.is_finite), None)
            if spoilt is not None:
                advice = "Look for it in the batch, then in what the model computes before that layer."
                where = f"batch {index}, where it reaches {spoilt or 'the model'},"
                raise fail(STAGE, where, "finite", "NaN or infinity", advice)
    for observer in observers.values():
        if not observer.seen:
            raise fail(STAGE, "batches", f"data that reaches {observer.name}", "none that does")
    return observers


def _sees(observer: Observer) -> Callable:
    return lambda _, args, kwargs: observer.see(args[0] if args else kwargs["input"])
