"""ReLU6 in place of ReLU keeps channels from being scaled: here it becomes ReLU, and what that changes is measured.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 5.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qk.inputs import tensors_in
from qk.prepare.prepared import Prepared
from qk.prepare.scaling import check_not_calibrated
from qk.prepare.source import run
from qk.prepare.tree import replace_module

STAGE = "qk.unclip"


@torch.no_grad()
def unclip(p: Prepared, batches: Iterable[Any]) -> float:
    """Puts nn.ReLU where an nn.ReLU6 stands on one of p.paths, so that channels can be scaled; p.unclipped names them.

    batches: inputs of the model, read once. Returns by how much that changes the float model's outputs on them: their
    power over that of the change, in dB; inf where nothing that is clipped mattered.
    """
    check_not_calibrated(p, STAGE)
    held = list(batches)
    before = [_outputs(p, batch) for batch in held]
    for name in dict.fromkeys(clip for path in p.paths for clip in path.clips):
        old = p.model.get_submodule(name)
        names = [n for n, module in p.model.named_modules(remove_duplicate=False) if module is old]
        replace_module(p.model, old, nn.ReLU(inplace=old.inplace).train(old.training))
        p.unclipped += names
    p.paths = [replace(path, clips=()) for path in p.paths]
    power = change = 0.0
    for batch, expected in zip(held, before, strict=True):
        for x, y in zip(_outputs(p, batch), expected, strict=True):
            power += float(y.square().sum())
            change += float((x - y).square().sum())
    return math.inf if change == 0 else 10 * math.log10(power / change)


def _outputs(p: Prepared, batch: Any) -> list[Tensor]:
    """Every floating tensor of the model's output, float64."""
    return [x.double() for x in tensors_in(run(p.model, batch)) if x.is_floating_point()]
