"""What quantization did to each layer: error, bytes, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import torch
from torch import Tensor, nn

from qk.deploy.modules import integer_layers
from qk.errors import fail
from qk.inputs import copied_to, device_of, feed
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Prepared
from qk.timing import alternate, quantile


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a call (medians). is_slower: three quarters of the integer calls took longer than three quarters
    of the float ones, which noise alone does not do."""

    float_ms: float
    integer_ms: float
    is_slower: bool


@dataclass(frozen=True)
class LayerMeasure:
    """One quantized layer.

    sqnr_db: of its output, quantized against float on the same float input. float_bytes, integer_bytes: of weight,
    bias, steps and zeros. times: of a call on the shape that it saw when the model was prepared.
    """

    name: str
    widths: str
    sqnr_db: float
    float_bytes: int
    integer_bytes: int
    times: LayerTimes


def measure_layers(p: Prepared, model: nn.Module, batches: Iterable[Any], rounds: int = 15) -> list[LayerMeasure]:
    """Every quantized layer of p, in running order. model: qk.convert(p). batches: inputs of the model."""
    errors = layer_errors(p, batches)
    times = all_layer_times(p, model, rounds)
    integer = integer_layers(model)
    out = []
    for name, layer in p.quant_layers().items():
        own = layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes)
        packed = sum(tensor.nbytes for tensor in integer[name].state_dict().values())
        out.append(LayerMeasure(name, layer.spec.describe(), errors[name], own, packed, times[name]))
    return out


def layer_errors(p: Prepared, batches: Iterable[Any]) -> dict[str, float]:
    """Layer name -> SQNR in dB: 10 log10(sum of y^2 / sum of (y - y_quantized)^2), both outputs from the input that the
    float model has there. inf: no error."""
    layers = p.quant_layers()
    signal = dict.fromkeys(layers, 0.0)
    noise = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable:
        def hook(layer: QuantLayer, inputs: tuple[Tensor], output: Tensor) -> None:
            layer.quantized = True
            error = layer.forward(*inputs).double() - output.double()
            layer.quantized = False
            signal[name] += output.double().square().sum().item()
            noise[name] += error.square().sum().item()

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    count = 0
    try:
        with p.quantized(set()) as model, torch.no_grad():
            for count, batch in enumerate(batches, 1):  # noqa: B007
                feed(model, copied_to(batch, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise fail("qk.layer_errors", "batches", "at least one batch", "none")
    return {name: sqnr(signal[name], noise[name]) for name in layers}


def table_sqnr(error: float) -> float:
    """In dB, of a table whose error has this length for a table of length 1; inf: no error."""
    return sqnr(1.0, error * error)


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB, from sums of squares."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal > 0 else -inf


def all_layer_times(p: Prepared, model: nn.Module, rounds: int = 15) -> dict[str, LayerTimes]:
    """Layer name -> times of each quantized layer of p. model: qk.convert(p)."""
    integer = integer_layers(model)
    layers = p.quant_layers().items()
    return {name: layer_times(layer, integer[name], p.layers[name].input_shape, rounds) for name, layer in layers}


def layer_times(layer: QuantLayer, module: nn.Module, shape: tuple[int, ...], rounds: int = 15) -> LayerTimes:
    """Both layers on the same random input, alternating.

    Each side gets the memory format in which its own network hands a convolution's input on: contiguous, channels_last.
    """
    device = layer.weight.device
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    xq = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    before, layer.quantized = layer.quantized, False
    try:
        with torch.inference_mode():
            floats, integers = alternate([lambda: layer(x), lambda: module(xq)], seconds=0, rounds=rounds)
    finally:
        layer.quantized = before
    is_slower = quantile(integers, 0.25) > quantile(floats, 0.75)
    return LayerTimes(quantile(floats, 0.5), quantile(integers, 0.5), is_slower)
