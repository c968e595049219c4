"""Product of float activations with weights of few bits, where only the weights are quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._epilogue import check_operands


def gemm_weight_only(x: Tensor, weight: Tensor, weight_step: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """sum x * (weight_step * (weight - weight_zero)) + bias.

    x: [..., K], float32, float16 or bfloat16. weight: from `prepack` with shape (N, K). weight_step: float32, [N] or
    [N, groups along K], added in order. bias: float32 [N] or None. bits: 2, 4 or 8, of the weight.
    Returns [..., N] in x's type. code - zero is exact; sums are float32 and the result is rounded once, within
    the error that docs/numerics.md gives. On the CPU every instruction set and every number of rows
    gives the same bits, but for bfloat16 of five rows and more where there is AMX, whose tiles add in their own order
    and take denormals for 0. CUDA adds in another order.
    Raises RuntimeError for another dtype, device or shape, or a weight prepacked otherwise.
    """
    return torch.ops.qk.gemm_weight_only(x, weight, weight_step, bias, bits)


def reference(
    x: Tensor, weight_codes: Tensor, weight_zero: Tensor, weight_step: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The definition, from plain codes of the weight [N, K], in float64."""
    n, k = weight_codes.shape
    groups = weight_step.numel() // n
    units = weight_codes.reshape(n, groups, -1).double() - weight_zero.reshape(n, groups, 1)
    y = x.double() @ (units * weight_step.reshape(n, groups, 1)).reshape(n, k).t()
    return (y if bias is None else y + bias).to(x.dtype)


@torch.library.register_fake("qk::gemm_weight_only")
def _(x, weight, weight_step, bias, bits):
    check_operands("gemm_weight_only", x, weight_step, weight, bias)
    return x.new_empty((*x.shape[:-1], weight_step.shape[0]))
