"""Calibration: the first choice of every step and zero, from data and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import get_args

import torch
from torch import Tensor

from qk.calibrate import ranges as find
from qk.calibrate.batches import call, hold, take, unpadded
from qk.calibrate.bias import correct_bias
from qk.calibrate.lapq import Loss, search
from qk.calibrate.observe import HistogramObserver, Observer
from qk.calibrate.statistics import match_statistics
from qk.calibrate.table import quantized_rows
from qk.errors import fail
from qk.prepare.insert import ActQuantizer, QuantLayer
from qk.prepare.prepared import Prepared, check_prepared, float_activations
from qk.prepare.rows import RowQuantizer
from qk.spec import Ranges

__all__ = ["RANGES", "calibrate", "calibrate_activations", "correct_bias", "match_statistics"]

RANGES = get_args(Ranges)
STAGE = "qk.calibrate"
Observers = dict[ActQuantizer | RowQuantizer, Observer]


@torch.no_grad()
def calibrate(
    p: Prepared,
    batches: Iterable,
    ranges: Ranges = "mse",
    max_batches: int | None = None,
    *,
    labels: Iterable[Tensor] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    memory_mb: int = 1024,
    progress: str = "off",
) -> None:
    """Sets step and zero of every quantizer of p, in place, the codes of the weights to the nearest ones, and the rows
    of embedding tables, which need no data and are left where they are set.

    The float model runs once over the batches (tensors, tuples of positional arguments, or dicts of keywords). Memory
    is bounded: exact ends and a sample of 2^18 values (kl: 2048 counts) for each tensor, spread over all batches.
    Positions that a batch's integer attention_mask [batch, positions] calls padding do not count.
    ranges: "minmax" clips nothing; "percentile" keeps 99.99 %; "mse" minimizes the error to the power 2.4; "kl" clips
    activations by the divergence of histograms, and takes mse for the weights; "lapq" searches for the steps of all
    layers together that minimize the loss of the whole quantized model, with half of the batches to judge what the
    other half finds, and leaves what it saw in p.search. The rest is for lapq alone:
    labels: classes, a tensor for each batch; then the loss is cross entropy. Without them it is the divergence from the
    float model's logits (half the squared error where the output is not [batch, classes]). loss: instead of these, a
    function of the model's output (its `logits`, or its first tensor) and the labels, or the float model's output; one
    number, the sum over the samples. seed: of the halves. memory_mb: for the batches where they are no list, and for
    outputs kept; more memory, fewer layers that run twice. progress: "auto", "bar", "lines" or "off".
    max_batches: by default a list or DataLoader is consumed whole and an iterable of unknown length up to 64 batches.
    Raises QkError for no batch, a batch that the model does not take, a NaN or infinity in the data or in a weight, a
    model with nothing to quantize, and labels or a loss that do not fit. p is unchanged then.
    """
    check_prepared(p, STAGE)
    if ranges not in RANGES:
        raise fail(STAGE, "ranges", f"one of {', '.join(RANGES)}", repr(ranges))
    if ranges != "lapq" and (labels is not None or loss is not None):
        got = f"{'labels' if loss is None else 'loss'} with ranges={ranges!r}"
        raise fail(STAGE, "labels and loss", "left out, as only lapq looks at them", got)
    if loss is not None and not callable(loss):
        raise fail(STAGE, "loss", "a function of output and labels", type(loss).__name__)
    layers = p.quant_layers()
    if not layers and not p.tables:
        reasons = "; ".join(f"{name}: {why}" for name, why in p.kept.items())
        raise fail(STAGE, "p", "a model with a quantized layer", f"none ({reasons})")
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise fail(STAGE, f"the weight of {name}", "finite", "NaN or infinity")
    if ranges == "lapq" and layers:
        if torch.is_inference_mode_enabled():  # its tensors do not say whether they were written into
            raise fail(STAGE, "the call", "outside torch.inference_mode for lapq", "inside it")
        batches = hold(batches, STAGE, max_batches, memory_mb)
        given = None if labels is None else _checked_labels(labels)
    tables = {name: quantized_rows(name, t, STAGE) for name, t in p.quant_tables().items() if t.rows is None}
    with p.quantized(set()):
        observers = _observe(p, layers, batches, HistogramObserver if ranges == "kl" else Observer, max_batches)
    for name, (table, error) in tables.items():
        p.quant_tables()[name].set_rows(table.rows, table.books, error)
    found = None
    if ranges == "lapq" and layers:
        options = {"loss": loss, "seed": seed, "memory_mb": memory_mb, "progress": progress}
        found = search(p, observers, batches, labels=given, **options)
    else:
        _set_ranges(observers, ranges)
        for layer in layers.values():
            layer.set_weight_range(*weight_range(layer, ranges))
    p.search = found
    p.calibrated, p.history = True, {}  # what was learned went with the codes


@torch.no_grad()
def calibrate_activations(p: Prepared, batches: list, ranges: Ranges) -> None:
    """Sets the steps of activations alone, from the model with its weights as they are quantized now and activations in
    float. ranges: as for calibrate, with mse in place of lapq, which chooses for all at once."""
    with float_activations(p), p.quantized():
        observers = _observe(p, p.quant_layers(), batches, HistogramObserver if ranges == "kl" else Observer, None)
    _set_ranges(observers, "mse" if ranges == "lapq" else ranges)


def _checked_labels(labels: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(labels, Tensor) or not isinstance(labels, Iterable):
        raise fail(STAGE, "labels", "an iterable with a tensor for each batch", type(labels).__name__)
    found = list(labels)
    wrong = next((x for x in found if not isinstance(x, Tensor)), None)
    if wrong is not None:
        raise fail(STAGE, "labels", "tensors, one for each batch", type(wrong).__name__)
    return found


def weight_range(layer: QuantLayer, ranges: str) -> tuple[Tensor, Tensor]:
    """Step and zero for each of layer.weight_rows(). On the grid mid-rise all but "minmax" are "mse"."""
    rows, spec = layer.weight_rows(), layer.spec
    if ranges == "percentile" and spec.grid == "mid-tread":
        return find.percentile(rows, spec.weights, spec.weight_symmetric)
    return find.of_weight(rows, spec, torch.inf if ranges == "minmax" else find.POWER)


def _set_ranges(observers: Observers, ranges: str) -> None:
    """Of quantizers that have a step; inputs of dynamic layers were only watched for NaN and infinities."""
    for quantizer, observer in observers.items():
        if isinstance(quantizer, ActQuantizer):
            quantizer.set_range(*_activation_range(observer, quantizer.bits, ranges))


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
) -> Observers:
    """One observer for each distinct quantizer, at the input of the first layer that has it: linked layers read the
    same tensor. The model runs as it stands."""
    observers: Observers = {}
    batch = None

    def sees(observer: Observer) -> Callable:
        return lambda layer, args, kwargs: observer.see(unpadded(batch, layer.taken(*args, **kwargs)))

    was_training = p.model.training
    with ExitStack() as stack:
        stack.callback(p.model.train, was_training)
        p.model.eval()
        for name, layer in layers.items():
            if layer.input not in observers:
                observer = observers[layer.input] = kind(name)
                handle = layer.register_forward_pre_hook(sees(observer), with_kwargs=True)
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
