"""SPARQ in front of a layer: which of its input's values share their bits, and what the layer then multiplies.

Source: Shomron et al., Post-Training Sparsity-Aware Quantization (2021). What one value becomes is in qk.ops.sparq; how
this differs from the released code in docs/methods/sparq.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qk import ops
from qk.errors import fail
from qk.ops.sparq import FAMILIES
from qk.options import Sparq

Cut = Callable[..., Tensor]
FOUR = 4  # neighbours along the channels of which at most two weights are not 0


def why_whole(sparq: Sparq, zero: int, channels: int) -> str:
    """Why a layer of this input keeps its whole codes; "" if they are cut. channels: that one output reads."""
    if zero and not sparq.signed:
        return "its input has values below 0"
    if channels == 1 and sparq.pairs != "none":
        return "it reads one channel, in which no value has a partner"
    return ""


def cut_codes(codes: Tensor, sparq: Sparq, groups: int = 1, zero: Tensor | None = None, cut: Cut = ops.sparq) -> Tensor:
    """What the kernels multiply. codes: [..., C] uint8, of a convolution in NHWC. groups: of the channels; pairs never
    cross them. zero: the code of 0, [1], where it is not code 0. cut: qk.ops.sparq or its definition.

    Returns uint8 [..., C], or with pairs by the weights [..., groups * 4 * C / groups], the order of `spread`.
    """
    if sparq.pairs == "weights":
        return _for_each_partner(codes, sparq, groups, zero, cut)
    pairs, own = sparq.pairs == "channels", codes.shape[-1] // groups
    if pairs and groups > 1 and own % 2:
        return cut(codes.unflatten(-1, (groups, own)), *FAMILIES[sparq.window], sparq.round, True, zero).flatten(-2)
    return cut(codes, *FAMILIES[sparq.window], sparq.round, pairs, zero)


# --- pairs by 2:4 sparse weights -------------------------------------------------------------------------------------
# Output channels pair the same values differently. A value has one of four partners in its group of four, itself
# standing for none; so it is multiplied in four versions, and each weight lies at the version of its partner.


def _for_each_partner(codes: Tensor, sparq: Sparq, groups: int, zero: Tensor | None, cut: Cut) -> Tensor:
    """Version d of a value: as if its partner were the one d places on in its group of four; 0: as if it had none."""
    family = FAMILIES[sparq.window]
    narrow = cut(codes, *family, sparq.round, False, zero)
    wide = cut(codes.unsqueeze(-1), *family, sparq.round, True, zero).squeeze(-1)
    is_zero = codes == (0 if zero is None else zero)
    own = codes.shape[-1] // groups
    fours = F.pad(is_zero.unflatten(-1, (groups, own)), (0, -own % FOUR)).unflatten(-1, (-1, FOUR))
    versions = [wide.unflatten(-1, (groups, own))]
    for d in range(1, FOUR):
        alone = fours.roll(-d, -1).flatten(-2)[..., :own]
        versions.append(torch.where(alone, versions[0], narrow.unflatten(-1, (groups, own))))
    return torch.stack(versions, -2).flatten(-3)


def repeated(x: Tensor, groups: int, channels: int = -1) -> Tensor:
    """C -> groups * 4 * C / groups along the axis `channels`: every version is the value itself."""
    parts = x.movedim(channels, -1).unflatten(-1, (groups, -1)).unsqueeze(-2)
    return parts.expand(*parts.shape[:-2], FOUR, parts.shape[-1]).flatten(-3).movedim(-1, channels)


def partners(is_used: Tensor) -> Tensor:
    """How far on in its group of four the other used weight lies; 0 for none, and for weights that are 0.

    is_used: [N, ..., C / groups], bool: a weight that is not 0. Returns int64 of that shape.
    """
    own = is_used.shape[-1]
    fours = F.pad(is_used, (0, -own % FOUR)).unflatten(-1, (-1, FOUR))
    found = torch.zeros(fours.shape, dtype=torch.int64, device=is_used.device)
    for d in range(1, FOUR):
        found = torch.where(fours & fours.roll(-d, -1), d, found)
    return found.flatten(-2)[..., :own]


def spread(weight: Tensor, zero: Tensor | None = None, is_used: Tensor | None = None) -> Tensor:
    """Each weight at the version that it multiplies. weight: [N, ..., C / groups], kernel order, float or, with zero
    [N], codes. is_used: which are not 0, where that is not to be seen. Returns [N, ..., 4 * C / groups]."""
    nothing = weight.new_zeros(1) if zero is None else zero.to(weight.dtype)
    nothing = nothing.reshape(-1, *[1] * (weight.dim() - 1))
    at = partners(weight != nothing if is_used is None else is_used)
    return torch.cat([torch.where(at == d, weight, nothing) for d in range(FOUR)], -1)


def check_sparse(weights: dict[str, Tensor], stage: str) -> None:
    """Raises QkError unless at most two weights of each four are not 0. weights: by layer, in kernel order."""
    dense = []
    for name, weight in weights.items():
        fours = F.pad(weight != 0, (0, -weight.shape[-1] % FOUR)).unflatten(-1, (-1, FOUR))
        if (fours.sum(-1) > 2).any():
            dense.append(name)
    if dense:
        expected = "for layers in which at most two weights of each four along the channels are not 0"
        advice = "Prune them, or give them pairs: channels, or sparq: null, in overrides."
        raise fail(stage, "sparq.pairs weights", expected, ", ".join(dense), advice)


# --- in float, to learn and to measure -------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """Values in place of x. The gradient is x's, and so the step's that of whole codes: cutting moves a value by a part
    of itself whatever the step, and code - x / step of the cut code would pull steps down (docs/methods/sparq.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_cut(x: Tensor, step: Tensor, zero: Tensor, sparq: Sparq, groups: int, channels: int) -> Tensor:
    """The values of the cut codes. x: fake-quantized to 8 bits with step and zero [1]. channels: their axis."""
    step = step.detach()
    codes = ops.quantize(x.detach().movedim(channels, -1), step, zero, 8)
    cut = cut_codes(codes, sparq, groups, zero if int(zero) else None)
    values = ops.dequantize(cut, step, zero).movedim(-1, channels)
    return _StraightThrough.apply(repeated(x, groups, channels) if sparq.pairs == "weights" else x, values)
