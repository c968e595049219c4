"""Bias correction: what quantization adds to the mean of a layer's output is taken off its bias.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.2, with
the means measured on data. LAPQ's released code moves the weights instead, by the mean that rounding gave a row; these
are then off their grid, and an integer kernel would have to sum the input for them. A bias costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from qk.calibrate.batches import Stop, call, hold, unpadded
from qk.errors import fail
from qk.inputs import evaluating
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Prepared, check_calibrated

STAGE = "qk.correct_bias"


@torch.no_grad()
def correct_bias(p: Prepared, batches: Iterable, max_batches: int | None = None, memory_mb: int = 1024) -> None:
    """Gives every quantized layer of p a bias with which its output has, for each channel, the mean of the float model.

    Layer by layer in running order, each with all before it quantized and corrected. A layer without a bias gets one.
    Calibration, or a second call, starts from the float biases. batches, max_batches, memory_mb: as for reconstruct.
    Raises QkError for p that is not calibrated, bad batches, and means that are not finite; p is unchanged then.
    """
    check_calibrated(p, STAGE)
    held = hold(batches, STAGE, max_batches, memory_mb)
    layers = p.quant_layers()
    before = {name: layer.corrected_bias for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.corrected_bias = None
        with evaluating(p.model):
            with p.quantized(set()):
                expected = moments(p, list(layers), held, STAGE)
            for name, layer in layers.items():
                with p.quantized():
                    found = moments(p, [name], held, STAGE)
                change = (expected[name].mean - found[name].mean).to(layer.weight.device, torch.float32)
                if not torch.isfinite(change).all():
                    raise fail(STAGE, f"the mean output of {name}", "finite", "NaN or infinity")
                layer.corrected_bias = change if layer.bias is None else layer.bias.detach().float() + change
    except BaseException:
        for name, layer in layers.items():
            layer.corrected_bias = before[name]
        raise


class Moments(NamedTuple):
    """float64 [channels]."""

    mean: Tensor
    variance: Tensor


def moments(p: Prepared, names: list[str], batches: list, stage: str) -> dict[str, Moments]:
    """Of each layer's output over all batches, as the model stands; a single layer ends a pass."""
    layers = p.quant_layers()
    total: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = dict.fromkeys(names, 0)
    ends = len(names) == 1 and p.layers[names[0]].calls == 1
    batch = None

    def watch(name: str) -> Callable:
        def see(layer: QuantLayer, _: tuple, output: Tensor) -> None:
            rows = output.movedim(1, -1) if layer.kind == "conv2d" and output.dim() == 4 else unpadded(batch, output)
            rows = rows.reshape(-1, rows.shape[-1]).double()
            total[name] = total.get(name, 0) + rows.sum(0)
            squares[name] = squares.get(name, 0) + rows.square().sum(0)
            count[name] += len(rows)
            if ends:
                raise Stop

        return see

    with ExitStack() as stack:
        for name in names:
            stack.callback(layers[name].register_forward_hook(watch(name)).remove)
        for index, batch in enumerate(batches):
            with suppress(Stop):
                call(p, batch, index, stage)
    missing = next((name for name in names if not count[name]), None)
    if missing is not None:
        raise fail(stage, "batches", f"data that reaches {missing}", "none that does")
    means = {name: total[name] / count[name] for name in names}
    return {name: Moments(m, (squares[name] / count[name] - m.square()).clamp(min=0)) for name, m in means.items()}
