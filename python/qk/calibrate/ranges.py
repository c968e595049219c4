"""From data to (step, zero): pure functions, one range for each row.

Every range is stretched to hold 0, so that zeros (padding, ReLU, pruned weights) stay exact, and zero is
clamp(rint(-low / step), 0, 2^bits - 1). Symmetric ranges have zero 2^(bits - 1). A row without any extent gets step 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk import ops
from qk.prepare.mid_rise import codes_of, middle
from qk.spec import QuantSpec

SHRINKS = 80  # BRECQ: the range is tried at 100 %, 99 %, ... 21 % of its size
POWER = 2.4  # the p of the Lp error there
PERCENT = 99.99
HISTOGRAM_BINS = 2048
SMALLEST_STEP = 1e-30  # below it 1 / step leaves float32


def step_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """The step and zero whose codes span [low, high], stretched to hold 0. Any shape; float32 and int32."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        half = 2 ** (bits - 1)
        step = torch.maximum(high / (half - 1), -low / half)
    else:
        step = high / top - low / top  # the difference of the quotients: high - low may overflow
    step = torch.where(step < SMALLEST_STEP, torch.ones_like(step), step)
    zero = torch.full_like(step, half) if symmetric else torch.round(-low / step).clamp(0, top)
    return step, zero.to(torch.int32)


def minmax(rows: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """rows: [rows, cols]. Returns step [rows], zero [rows]: nothing is clipped."""
    low, high = torch.aminmax(rows, dim=1)
    return step_and_zero(low, high, bits, symmetric)


def percentile(rows: Tensor, bits: int, symmetric: bool = False, percent: float = PERCENT) -> tuple[Tensor, Tensor]:
    """The range between the values at 100 - percent and at percent, each taken from the data."""
    ordered = rows.sort(dim=1).values
    last = rows.shape[1] - 1
    clipped = int(last * (100 - percent) / 100)
    return step_and_zero(ordered[:, clipped], ordered[:, last - clipped], bits, symmetric)


def mse(
    rows: Tensor,
    bits: int,
    symmetric: bool = False,
    low: Tensor | None = None,
    high: Tensor | None = None,
    power: float = POWER,
    ends: bool = False,
) -> tuple[Tensor, Tensor]:
    """The range, shrunk in steps of 1 %, with the smallest sum of |fake quantized - x|^power; ties keep the larger.

    rows: [rows, cols]. low, high: [rows], the full range if it is not the rows' own (they may be a sample). ends: also
    try to shrink one end alone, which pays where only one has outliers.
    Source: the search in BRECQ's released code (Li et al., 2021).
    """
    own_low, own_high = torch.aminmax(rows, dim=1)
    low = (own_low if low is None else low).clamp(max=0)
    high = (own_high if high is None else high).clamp(min=0)
    shrink = 1 - 0.01 * torch.arange(SHRINKS, dtype=torch.float32, device=rows.device)
    whole = torch.ones_like(shrink)
    of_low = torch.cat([shrink, whole, shrink]) if ends else shrink
    of_high = torch.cat([shrink, shrink, whole]) if ends else shrink
    step, zero = step_and_zero(low[:, None] * of_low, high[:, None] * of_high, bits, symmetric)
    error = ops.range_error(rows, step, zero, bits, power)
    best = error.argmin(dim=1, keepdim=True)  # the first of equal ones
    return step.gather(1, best).squeeze(1), zero.gather(1, best).squeeze(1)


def mid_rise(rows: Tensor, bits: int, power: float = POWER) -> tuple[Tensor, Tensor]:
    """As mse does, for the grid of qk.prepare.mid_rise; power inf clips nothing. Returns half a step, and the zero."""
    ends = rows.abs().amax(1) / (2**bits - 1)
    ends = torch.where(ends < SMALLEST_STEP, torch.ones_like(ends), ends)
    zero = torch.full_like(ends, middle(bits), dtype=torch.int32)
    if power == torch.inf:
        return ends, zero
    best, found = torch.full_like(ends, torch.inf, dtype=torch.float64), ends
    for i in range(SHRINKS):
        step = ends * (1 - 0.01 * i)
        values = ops.dequantize(codes_of(rows, step, bits), step, zero)
        error = (values - rows).abs().pow(power).sum(1, dtype=torch.float64)
        found, best = torch.where(error < best, step, found), torch.minimum(error, best)
    return found, zero


def of_weight(rows: Tensor, spec: QuantSpec, power: float = POWER) -> tuple[Tensor, Tensor]:
    """As mse or mid_rise, whichever the layer's grid asks for. rows: of its weight; power inf clips nothing."""
    if spec.grid == "mid-rise":
        return mid_rise(rows, spec.weights, power)
    if power == torch.inf:
        return minmax(rows, spec.weights, spec.weight_symmetric)
    return mse(rows, spec.weights, spec.weight_symmetric, power=power)


def kl(histogram: Tensor, width: float, low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    """The range whose quantized histogram of |x| diverges least from the full one.

    histogram: [bins] counts of |x|, bins of `width` each. low, high: of x. Where x has both signs, half of the codes
    serve each. Returns step [1], zero [1].
    Source: Migacz, 8-bit Inference with TensorRT (2017).
    """
    levels = 2**bits if low >= 0 else 2 ** (bits - 1)
    counts = histogram.double()
    filled = int(counts.nonzero().max()) + 1 if counts.any() else 0
    best, threshold = torch.inf, filled
    for kept in range(levels, filled + 1):
        divergence = _divergence(counts[:filled], kept, levels)
        if divergence <= best:  # on a tie the larger range
            best, threshold = divergence, kept
    limit = threshold * width
    low_end, high_end = torch.tensor([max(low, -limit)]), torch.tensor([min(high, limit)])
    return step_and_zero(low_end, high_end, bits)


def _divergence(counts: Tensor, kept: int, levels: int) -> float:
    """KL(p || q): p is the first `kept` bins with the rest in the last of them; q is what `levels` steps can tell.

    An empty last bin of q counts as a ten-thousandth of a value: clipping into it costs much, but not everything.
    """
    inside = counts[:kept]
    p = inside.clone()
    p[-1] += counts[kept:].sum()
    level = torch.arange(kept) * levels // kept
    occupied = (inside > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, occupied)
    q = (mass / bins.clamp(min=1))[level] * occupied
    q = q.clamp(min=1e-4)
    p, q = p / p.sum(), q / q.sum()
    return float(torch.special.xlogy(p, p / q).sum())
