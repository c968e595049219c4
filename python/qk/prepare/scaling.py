"""Scales channels along the paths of a prepared model (qk.prepare.paths), and says where it did and where not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qk.errors import fail
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Path, Prepared, check_prepared

CLIP = 6.0  # of nn.ReLU6


@dataclass(frozen=True)
class Scaled:
    """done: source -> its readers. skipped: source -> why its channels were left as they are."""

    done: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def notes(self, word: str) -> list[str]:
        """For the report. word: Equalized, Smoothed."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            by_reason[reason].append(name)
        pairs = "; ".join(f"{source} -> {', '.join(readers)}" for source, readers in self.done.items())
        return [f"{word}: {pairs or 'nothing'}."] + [
            f"Not {word.lower()}: {', '.join(names)}: {reason}." for reason, names in by_reason.items()
        ]


def check_not_calibrated(p: Prepared, stage: str) -> None:
    """Raises QkError for what is no Prepared, and after calibration, as steps and codes are of the weights before."""
    check_prepared(p, stage)
    if p.calibrated:
        raise fail(stage, "p", "not calibrated yet", "one that is", "Call it between qk.prepare and qk.calibrate.")


def usable_paths(p: Prepared, stage: str, through_clips: bool = False) -> tuple[list[Path], dict[str, str]]:
    """Paths along which scaling changes nothing in float and something when quantized, and why not the others.

    through_clips: those through ReLU6 too, which keep only the factors that within_clip gives. Raises QkError as
    check_not_calibrated does.
    """
    check_not_calibrated(p, stage)
    usable, skipped = [], dict(p.blocked)
    for path in p.paths:
        if path.clips and not through_clips:
            skipped[path.source] = "its output goes through ReLU6, which keeps no factor"
        elif all(p.plan[name].is_float for name in path.readers):
            skipped[path.source] = "what reads its output stays in float"
        else:
            usable.append(path)
    return usable, skipped


def made_ranges(p: Prepared, path: Path) -> Tensor:
    """max of |w| and |b| of what makes each channel: a row of a layer, an entry of a norm; float64."""
    source = _modules(p, path.source)[-1]
    found = source.weight.detach().double().abs().reshape(path.channels, -1).amax(1)
    bias = getattr(source, "bias", None)
    return found if bias is None else found.maximum(bias.detach().double().abs())


def read_ranges(p: Prepared, path: Path) -> Tensor:
    """max |w| of what the readers multiply with each channel of the source; float64, 0 for one that none reads."""
    ranges = {name: by_input(_modules(p, name)[-1]).double().abs().amax((1, 3)).flatten() for name in path.readers}
    device = next(iter(ranges.values())).device
    found = torch.zeros(path.channels, dtype=torch.float64, device=device)
    for name, channels in path.readers.items():
        found.scatter_reduce_(0, channels.to(device), ranges[name], "amax")
    return found


def by_input(layer: nn.Module) -> Tensor:
    """The weight as [groups, N / groups, C / groups, taps]: input channel c of group g is at [g, :, c]."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.detach().reshape(groups, len(layer.weight) // groups, layer.weight.shape[1], -1)


def times_input(layer: nn.Module, factor: Tensor) -> Tensor:
    """The weight with what is multiplied with input channel c times factor[c]; computed in the type of factor."""
    weight = by_input(layer)
    groups, _, inputs, _ = weight.shape
    return (weight * factor.reshape(groups, 1, inputs, 1)).reshape(layer.weight.shape)


def within_clip(factor: Tensor, made: Tensor) -> Tensor:
    """Factors in the ratios of `factor` as far as a ReLU6 behind the source keeps them: from min(made, 6) / 6 to 1.

    made: the largest value of each channel before it, over some batches; [C], as factor. The source is divided by s, so
    ReLU6 clips what was above 6 s: with s of at most 1, what it clipped, and above what the batches show.
    """
    least = made.clamp(0, CLIP) / CLIP
    largest = factor.where(least > 0, 0.0).max()  # channels that are always 0 have no say
    return (factor / largest).clamp(max=1).maximum(least) if largest > 0 else torch.ones_like(factor)


@torch.no_grad()
def scale(p: Prepared, path: Path, factor: Tensor) -> None:
    """Divides channel i of the source by factor[i] and multiplies what reads it: nothing changes but roundings.

    factor: [channels], float64, positive. Each weight and bias is computed in float64 and rounded once.
    """
    own = [t for module in _modules(p, path.source) for t in (module.weight, getattr(module, "bias", None))]
    for parameter in {id(t): t for t in own if t is not None}.values():
        parameter.copy_(parameter.double() / factor.reshape(-1, *[1] * (parameter.dim() - 1)))
    for name, channels in path.readers.items():
        by = factor[channels.to(factor.device)]
        for layer in {id(module.weight): module for module in _modules(p, name)}.values():
            layer.weight.copy_(times_input(layer, by))


def _modules(p: Prepared, name: str) -> list[nn.Module]:
    """What holds the weights of a layer or norm: of a layer the float one, and the one that simulates it, last. They
    share their parameters unless the latter divides its input."""
    inside = p.model.get_submodule(name)
    return [p.originals[name], inside] if name in p.originals else [inside]


@torch.no_grad()
def divide_inputs(layers: list[QuantLayer], factor: Tensor) -> None:
    """Of Linear layers that read one tensor: it is divided by factor, [K], float64, where they take it in, and their
    weights, from now on their own, take that up. They share what they multiply with: a fused model does so once."""
    before = layers[0].input_scale
    inverse = ((1.0 if before is None else before) / factor).float()
    for layer in layers:
        layer.weight = nn.Parameter(times_input(layer, factor).float(), layer.weight.requires_grad)
        layer.input_scale = inverse
