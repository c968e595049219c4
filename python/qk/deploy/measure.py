"""What quantization did to each layer: error, bytes, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, log10
from typing import Any

import torch
from torch import Tensor, nn

from qk.deploy.checkpoint import integer_layers
from qk.errors import fail
from qk.prepare.insert import QuantLayer
from qk.prepare.observe import run
from qk.prepare.prepared import Prepared


@dataclass(frozen=True)
class LayerMeasure:
    """One quantized layer.

    sqnr_db: of its output, quantized against float on the same float input. float_bytes, integer_bytes: of weight,
    bias, steps and zeros. float_ms, integer_ms: a call on the shape that it saw when the model was prepared (medians).
    """

    name: str
    widths: str
    sqnr_db: float
    float_bytes: int
    integer_bytes: int
    float_ms: float
    integer_ms: float


def measure_layers(p: Prepared, model: nn.Module, batches: Iterable[Any], rounds: int = 15) -> list[LayerMeasure]:
    """Every quantized layer of p, in running order. model: qk.convert(p). batches: inputs of the model."""
    errors = layer_errors(p, batches)
    integer = integer_layers(model)
    out = []
    for name, layer in p.quant_layers().items():
        module = integer[name]
        float_ms, integer_ms = layer_times(layer, module, p.layers[name].input_shape, rounds)
        own = layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes)
        packed = sum(tensor.nbytes for tensor in module.state_dict().values())
        out.append(LayerMeasure(name, layer.spec.describe(), errors[name], own, packed, float_ms, integer_ms))
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
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise fail("qk.layer_errors", "batches", "at least one batch", "none")
    return {name: sqnr(signal[name], noise[name]) for name in layers}


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB, from sums of squares."""
    if noise == 0:
        return inf
    return 10 * log10(signal / noise) if signal > 0 else -inf


def layer_times(layer: QuantLayer, module: nn.Module, shape: tuple[int, ...], rounds: int = 15) -> tuple[float, float]:
    """Milliseconds of a call, float and integer, on random input: medians of alternated rounds.

    Each side gets the memory format in which its own network hands a convolution's input on: contiguous, channels_last.
    """
    x = torch.randn(shape, device=layer.weight.device)
    xq = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    times: tuple[list[float], list[float]] = ([], [])
    before, layer.quantized = layer.quantized, False
    try:
        with torch.inference_mode():
            for i in range(rounds + 1):
                for side, (side_run, value) in enumerate(((layer, x), (module, xq))):
                    _wait(x)
                    start = time.perf_counter()
                    side_run(value)
                    _wait(x)
                    if i:  # the first call warms up
                        times[side].append((time.perf_counter() - start) * 1e3)
    finally:
        layer.quantized = before
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
