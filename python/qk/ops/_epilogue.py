"""What the definitions of gemm and conv2d share: from exact sums to results (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device
from qk.ops._values import result, value


def finish(
    sums: list[Tensor],
    x_step: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    activation: str,
    out_step: Tensor | None,
    out_zero: Tensor | None,
    out_bits: int,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
) -> Tensor:
    """activation(sum over groups of float(acc) * (x_step * weight_step) + bias + residual), then, with out_step, codes.

    sums: for each group of K, [..., N] int32. x_step: broadcasts against [..., 1]. weight_step: [N] or [N, groups].
    residual: [..., N], float32, or codes with residual_step and residual_zero.
    """
    steps = weight_step.reshape(weight_step.shape[0], -1)
    y = sums[0].to(torch.float32) * (x_step * steps[:, 0])
    for g in range(1, len(sums)):
        y = y + sums[g].to(torch.float32) * (x_step * steps[:, g])
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + value(residual, residual_step, residual_zero).reshape(y.shape)
    return result(y, activation, out_step, out_zero, out_bits)


def check_operands(op: str, x: Tensor, weight_step: Tensor, *others: Tensor | None, rank: int = 0) -> None:
    """For fakes: what the shape of the result hangs on. rank: of x; 0 is any but a scalar."""
    on_one_device(op, x, weight_step, *others)
    if x.dim() != rank if rank else x.dim() == 0:
        raise RuntimeError(f"qk::{op}: x must have {rank or 'at least 1'} dimensions, got {list(x.shape)}.")
    if weight_step.dim() not in (1, 2):
        raise RuntimeError(f"qk::{op}: weight_step must be [N] or [N, groups], got {list(weight_step.shape)}.")


def result_dtype(out_step: Tensor | None) -> torch.dtype:
    return torch.float32 if out_step is None else torch.uint8
