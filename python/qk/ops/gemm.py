"""Integer matrix product with a fused epilogue: the linear layer of an integer model."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._epilogue import check_operands, finish, result_dtype


def gemm(
    x: Tensor,
    x_step: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    bits: int,
    x_bits: int = 8,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
) -> Tensor:
    """activation(x_step * weight_step * sum (x - x_zero)(weight - weight_zero) + bias + residual), the sum exact.

    x: [..., K], uint8 codes below 2^x_bits. x_step: float32 and x_zero: int32, one value each or one for each row.
    weight: from `prepack` with shape (N, K). weight_step: float32, [N] or [N, groups along K], added in order.
    bias: float32 [N] or None. bits: 2, 4 or 8, of the weight. x_bits: 2 to 8. activation: "none", "relu" or "relu6".
    out_step, out_zero: one value each; with them the result is quantized to codes of out_bits.
    residual: [..., N], added after the bias: float32, or codes with residual_step and residual_zero, one value each.
    Returns [..., N], float32, or uint8 with out_step; the same bits on every device (docs/numerics.md).
    Raises RuntimeError for another dtype, device or shape, a weight prepacked otherwise, or a K so long that a sum
    could leave int32.
    """
    return torch.ops.qk.gemm(
        x,
        x_step,
        x_zero,
        weight,
        weight_step,
        bias,
        bits,
        x_bits,
        activation,
        out_step,
        out_zero,
        out_bits,
        residual,
        residual_step,
        residual_zero,
    )


def reference(
    x: Tensor,
    x_step: Tensor,
    x_zero: Tensor,
    weight_codes: Tensor,
    weight_zero: Tensor,
    weight_step: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
) -> Tensor:
    """The definition, from plain codes of the weight [N, K]. The sums are exact in float64."""
    n, k = weight_codes.shape
    rows = x.reshape(-1, k).double() - x_zero.reshape(-1, 1)
    groups = weight_step.numel() // n
    weight = weight_codes.reshape(n, groups, -1).double() - weight_zero.reshape(n, groups, 1)
    parts = zip(rows.split(k // groups, 1), weight.unbind(1), strict=True)
    sums = [(part @ w.t()).to(torch.int32) for part, w in parts]
    if residual is not None:
        residual = residual.reshape(-1, n)
    epilogue = (out_step, out_zero, out_bits, residual, residual_step, residual_zero)
    y = finish(sums, x_step.reshape(-1, 1), weight_step, bias, activation, *epilogue)
    return y.reshape(*x.shape[:-1], n)


@torch.library.register_fake("qk::gemm")
def _(
    x,
    x_step,
    x_zero,
    weight,
    weight_step,
    bias,
    bits,
    x_bits=8,
    activation="none",
    out_step=None,
    out_zero=None,
    out_bits=8,
    residual=None,
    residual_step=None,
    residual_zero=None,
):
    check_operands(
        "gemm", x, weight_step, x_step, x_zero, weight, bias, out_step, out_zero, residual, residual_step, residual_zero
    )
    return x.new_empty((*x.shape[:-1], weight_step.shape[0]), dtype=result_dtype(out_step))
