"""Cross-layer equalization: scale channels so that what makes one and what reads it have weights of one range.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.1.
Differences are in docs/methods/equalize.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.prepare.prepared import Prepared
from qk.prepare.scaling import Scaled, made_ranges, read_ranges, scale, usable_paths

STAGE = "qk.equalize"
ROUNDS = 100
SETTLED = 0.01  # a round that moves no channel by more than 1 % is the last


def equal_factor(made: Tensor, read: Tensor) -> Tensor:
    """s = sqrt(r1 r2) / r2 = sqrt(r1 / r2): then r1 / s = r2 s. 1 where a range is 0. made, read: r1, r2."""
    return torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)


def equalize(p: Prepared) -> Scaled:
    """Makes the ranges of weights equal on both sides of every channel along p.paths, in place, without data.

    Paths in running order, again and again until no channel moves by more than 1 %: layers in a chain, such as a
    depthwise one between two others, are on two paths. In float p computes what it did, up to roundings of weights.
    Returns what was scaled and, for all other layers and norms, why not. To be called before qk.calibrate.
    Raises QkError for what qk.prepare did not return, and for p that is calibrated.
    """
    paths, skipped = usable_paths(p, STAGE)
    for _ in range(ROUNDS):
        moved = 0.0
        for path in paths:
            factor = equal_factor(made_ranges(p, path), read_ranges(p, path))
            scale(p, path, factor)
            moved = max(moved, float(factor.log().abs().max()))
        if moved < SETTLED:
            break
    return Scaled({path.source: tuple(path.readers) for path in paths}, skipped)
