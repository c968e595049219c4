"""Statistics of BatchNorm, found again for a quantized network whose BatchNorms are folded.

Where BatchNorm is still there, it is run over data once more with quantization active, and so takes away what that does
to the mean and variance of its input; SPARQ's released code does so with its kernel active. A folded one leaves two
numbers for each channel that can do the same, the steps of the weight and the bias: no code of the weight changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qk.calibrate.batches import hold
from qk.calibrate.bias import Moments, moments
from qk.errors import fail
from qk.inputs import evaluating
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Prepared, check_calibrated

STAGE = "qk.match_statistics"
DEAD = 1e-6  # a channel below this part of the layer's largest variance says nothing about its scale
MOST = 2.0  # by which the steps of a channel change at most


@torch.no_grad()
def match_statistics(p: Prepared, batches: Iterable, max_batches: int | None = None, memory_mb: int = 1024) -> None:
    """Gives every quantized layer that took up a BatchNorm the mean and variance that its output has in float.

    Layer by layer in running order, each with all before it quantized and matched: its weight's steps and bias change.
    Channels keep their scale where they hardly vary, and change it twofold at most. batches, max_batches, memory_mb: as
    for reconstruct, and come after it; calibration starts anew. qk.correct_bias may follow, for all other layers.
    Raises QkError for p that is not calibrated or has no such layer, bad batches, and moments that are not finite; p is
    unchanged then.
    """
    check_calibrated(p, STAGE)
    layers = matched_layers(p)
    if any(layer.weight_step is None for layer in layers.values()):
        raise fail(STAGE, "p", "with codes that stay", "one in training, which learns its steps")
    held = hold(batches, STAGE, max_batches, memory_mb)
    changed = ("weight_step", "tail_step", "corrected_bias")
    before = {name: {what: getattr(layer, what) for what in changed} for name, layer in layers.items()}
    try:
        with evaluating(p.model):
            with p.quantized(set()):
                expected = moments(p, list(layers), held, STAGE)
            for name, layer in layers.items():
                with p.quantized():
                    found = moments(p, [name], held, STAGE)[name]
                if not all(torch.isfinite(t).all() for t in (*expected[name], *found)):
                    raise fail(STAGE, f"the output of {name}", "finite", "NaN or infinity")
                scale = scales(expected[name], found)
                bias = layer.quantized_bias.double() * scale + expected[name].mean - found.mean * scale
                rows = scale.reshape(-1, *[1] * (layer.weight_step.dim() - 1))
                layer.weight_step = (layer.weight_step.double() * rows).float()
                if layer.tail_owners is not None:
                    layer.tail_step = (layer.tail_step.double() * scale[layer.tail_owners]).float()
                layer.corrected_bias = bias.float()
    except BaseException:
        for name, layer in layers.items():
            for what, tensor in before[name].items():
                setattr(layer, what, tensor)
        raise


def matched_layers(p: Prepared) -> dict[str, QuantLayer]:
    """The layers of match_statistics. Raises QkError where there is none."""
    took_up = set(p.folds.values())
    layers = {name: layer for name, layer in p.quant_layers().items() if name in took_up}
    if not layers:
        advice = "qk.correct_bias matches the means of any layer."
        raise fail(STAGE, "p", "a model with a quantized layer that took up a BatchNorm", "none", advice)
    return layers


def scales(expected: Moments, found: Moments) -> Tensor:
    """What each channel's output is multiplied with: sqrt(expected variance / found variance), within limits."""
    floor = DEAD * expected.variance.max()
    varies = (expected.variance > floor) & (found.variance > floor)
    scale = (expected.variance / found.variance.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return torch.where(varies, scale.clamp(1 / MOST, MOST), 1.0)
