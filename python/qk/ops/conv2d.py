"""Integer convolution with a fused epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.ops._epilogue import check_operands, finish, result_dtype


def conv2d(
    x: Tensor,
    x_step: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
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

    x: [B, H, W, C] (NHWC), uint8 codes below 2^x_bits; what is padded has the code x_zero, the value 0. x_step: float32
    and x_zero: int32, one value each. weight: from `prepack` with shape (N, kh, kw, C / groups) and the same groups.
    weight_step: float32, [N] or [N, groups along K] with K = kh * kw * C / groups. The rest as in `gemm`.
    Returns [B, OH, OW, N], float32, or uint8 with out_step; OH = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1.
    Raises RuntimeError as `gemm`, and for a kernel that reaches beyond the padded input, a stride or dilation below 1,
    a negative padding, or groups that do not divide the channels.
    """
    return torch.ops.qk.conv2d(
        x,
        x_step,
        x_zero,
        weight,
        weight_step,
        bias,
        bits,
        kernel,
        stride,
        padding,
        dilation,
        groups,
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
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
) -> Tensor:
    """The definition, from plain codes of the weight [N, kh, kw, C / groups]. The sums are exact in float64."""
    n = weight_codes.shape[0]
    k_groups = weight_step.numel() // n
    image = (x.double() - x_zero.double()).permute(0, 3, 1, 2)  # padding with 0 is padding with the code x_zero
    weight = weight_codes.reshape(n, k_groups, -1).double() - weight_zero.reshape(n, k_groups, 1)
    sums = []
    for g in range(k_groups):
        part = torch.zeros_like(weight)
        part[:, g] = weight[:, g]
        filters = part.reshape(weight_codes.shape).permute(0, 3, 1, 2)
        acc = F.conv2d(image, filters, None, stride, padding, dilation, groups)
        sums.append(acc.to(torch.int32).permute(0, 2, 3, 1).contiguous())
    epilogue = (out_step, out_zero, out_bits, residual, residual_step, residual_zero)
    return finish(sums, x_step.reshape(1), weight_step, bias, activation, *epilogue)


@torch.library.register_fake("qk::conv2d")
def _(
    x,
    x_step,
    x_zero,
    weight,
    weight_step,
    bias,
    bits,
    kernel,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
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
        "conv2d",
        x,
        weight_step,
        x_step,
        x_zero,
        weight,
        bias,
        out_step,
        out_zero,
        residual,
        residual_step,
        residual_zero,
        rank=4,
    )

    def pair(name, v):
        if len(v) not in (1, 2) or (name == "stride" and min(v) < 1):
            raise RuntimeError(f"qk::conv2d: {name} must be one or two values, positive for stride, got {list(v)}.")
        return (v[0], v[-1])

    named = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    sizes = zip(x.shape[1:3], *(pair(*item) for item in named.items()), strict=True)
    oh, ow = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    return x.new_empty((x.shape[0], oh, ow, weight_step.shape[0]), dtype=result_dtype(out_step))
