"""Float values to codes, each row with the step and zero of its own range: dynamic activations."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import codes as _codes

SMALLEST_STEP = 2.0**-126  # the smallest normal float32: its reciprocal is finite


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x, and for each row the step and zero that stretch its minimum, its maximum and 0 over all codes.

    x: [..., cols], float32. bits: 2 to 8. Returns codes [..., cols] uint8, step [...] float32 and zero [...] int32, as
    `dequantize` takes them; a row of zeros has step 1 and zero 0. NaN and +-Inf do not take part in the range; NaN gets
    the code zero, Inf the nearest end. Raises RuntimeError for another dtype or width, or an x without a dimension.
    """
    return torch.ops.qk.quantize_rows(x, bits)


def reference(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition; every operation rounds to float32 once, in this order."""
    top = 2**bits - 1
    with_zero = torch.cat([torch.where(x.isfinite(), x, 0.0), x.new_zeros(*x.shape[:-1], 1)], -1)
    low, high = with_zero.amin(-1), with_zero.amax(-1)
    # Halves, because high - low may exceed float32. A tensor as divisor: by a number, CUDA would multiply instead.
    step = (high * 0.5 - low * 0.5) / torch.full_like(low, top * 0.5)
    step = torch.where(high > low, step.clamp(min=SMALLEST_STEP), 1.0)
    zero = torch.clamp(torch.round(-low * (1.0 / step)), 0, top).to(torch.int32)
    return _codes(x, step, zero, bits).to(torch.uint8).reshape(x.shape), step, zero


@torch.library.register_fake("qk::quantize_rows")
def _(x, bits):
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(rows),
        x.new_empty(rows, dtype=torch.int32),
    )
