"""The error that each of many candidate ranges makes, for the search of the best one.

Source of the power 2.4: the search of Li et al., BRECQ (2021), as released.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device, widened


def range_error(x: Tensor, step: Tensor, zero: Tensor, bits: int, power: float = 2.0) -> Tensor:
    """For each row of x and each of its candidates: the sum over the row of |fake_quantized(x) - x|^power.

    x: [rows, cols], float32, float16 or bfloat16; a tensor with one range is [1, n]. step: float32, positive, and
    zero: int32, both [rows, candidates]. bits: 2 to 8. power: positive; 1 and 2 take no logarithm.
    Returns [rows, candidates], float32; NaN for a row with NaN in it. The same bits for every number of threads and
    instruction set. Raises RuntimeError for another dtype, device, shape, or a step that is not positive.
    """
    return torch.ops.qk.range_error(x, step, zero, bits, power)


def reference(x: Tensor, step: Tensor, zero: Tensor, bits: int, power: float = 2.0) -> Tensor:
    """The definition: errors in float32 as fake-quantization gives them, powers and sums in float64."""
    low = -zero.to(torch.float32).unsqueeze(-1)  # [rows, candidates, 1]
    values = widened(x).unsqueeze(1)
    inverse = (1.0 / step).unsqueeze(-1)
    code = torch.round(torch.minimum(torch.maximum(values * inverse, low), low + (2**bits - 1)))
    return (code * step.unsqueeze(-1) - values).double().abs().pow(power).sum(-1).float()


@torch.library.register_fake("qk::range_error")
def _(x, step, zero, bits, power):
    on_one_device("range_error", x, step, zero)
    return torch.empty_like(step, memory_format=torch.contiguous_format)
