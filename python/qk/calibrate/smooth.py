"""Smoothing: channels of large activations are scaled down, and the weights that read them up.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (2023),
section 4. Differences are in docs/methods/smooth.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qk.calibrate.batches import call, take
from qk.errors import fail
from qk.inputs import evaluating
from qk.prepare.prepared import Path, Prepared
from qk.prepare.scaling import Scaled, read_ranges, scale, usable_paths

STAGE = "qk.smooth"
ROUNDS = 20
SETTLED = 0.01  # as in equalization


def smooth_factor(inputs: Tensor, read: Tensor, alpha: float) -> Tensor:
    """s = max |X|^alpha / max |W|^(1 - alpha) for each channel; 1 where a range is 0."""
    there = (inputs > 0) & (read > 0)
    return torch.where(there, inputs.pow(alpha) / read.pow(1 - alpha), 1.0)


@torch.no_grad()
def smooth(p: Prepared, batches: Iterable, alpha: float = 0.5, max_batches: int | None = None) -> Scaled:
    """Moves the difficulty of activations into weights along p.paths, in place: from a norm or a layer to its readers.

    alpha: 0 leaves all of it with the activations, 1 moves all of it to the weights. batches, max_batches: as for
    calibrate; the float model runs once. In float p computes what it did, up to roundings of weights. Returns what was
    scaled and, for all other layers and norms, why not. To be called before qk.calibrate.
    Raises QkError, with p unchanged, for p that is calibrated, alpha outside [0, 1] and bad batches.
    """
    paths, skipped = usable_paths(p, STAGE)
    if not 0 <= alpha <= 1:
        raise fail(STAGE, "alpha", "from 0 to 1", alpha)
    ranges = input_ranges(p, paths, batches, max_batches)
    for _ in range(ROUNDS):  # a layer in a chain has its weight changed from both sides
        moved = 0.0
        for path in paths:
            factor = smooth_factor(ranges[path.source], read_ranges(p, path), alpha)
            scale(p, path, factor)
            ranges[path.source] = ranges[path.source] / factor
            moved = max(moved, float(factor.log().abs().max()))
        if moved < SETTLED:
            break
    return Scaled({path.source: tuple(path.readers) for path in paths}, skipped)


def input_ranges(
    p: Prepared, paths: list[Path], batches: Iterable, max_batches: int | None = None
) -> dict[str, Tensor]:
    """Source -> max |x| of each of its channels where its readers take it in; float64 [channels]."""
    found = {
        path.source: torch.zeros(path.channels, dtype=torch.float64, device=_device(p, path.source)) for path in paths
    }
    with ExitStack() as stack, evaluating(p.model), p.quantized(set()):
        for path in paths:
            for name, channels in path.readers.items():
                reader = p.model.get_submodule(name)
                handle = reader.register_forward_pre_hook(_sees(found[path.source], channels), with_kwargs=True)
                stack.callback(handle.remove)
        for index, batch in enumerate(take(batches, STAGE, max_batches)):
            call(p, batch, index, STAGE)
    for source, ranges in found.items():
        if not torch.isfinite(ranges).all():
            raise fail(STAGE, f"what {source} gives", "finite", "NaN or infinity", "Look for it in the batches.")
    return found


def _sees(into: Tensor, channels: Tensor) -> Callable:
    def see(reader: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        x = x.movedim(1 if reader.weight.dim() == 4 else -1, 0).flatten(1).abs().amax(1)
        into.scatter_reduce_(0, channels.to(into.device), x.double(), "amax")

    return see


def _device(p: Prepared, name: str) -> torch.device:
    module = p.originals.get(name) or p.model.get_submodule(name)
    return module.weight.device
