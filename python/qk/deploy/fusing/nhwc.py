"""Float operators on NHWC tensors: the kernels of the traced model, so its bits, seen from the other layout.

The graphs of fuse hold them in place of the NCHW operators, so that no permutation stands between integer layers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    return F.max_pool2d(x.permute(NCHW), kernel, stride, padding, dilation, ceil_mode).permute(NHWC)


def avg_pool(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    y = F.avg_pool2d(x.permute(NCHW), kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return y.permute(NHWC)


def adaptive_avg_pool(x: Tensor, size: list[int]) -> Tensor:
    return F.adaptive_avg_pool2d(x.permute(NCHW), size).permute(NHWC)


def mean(x: Tensor) -> Tensor:
    """Over the image: [B, H, W, C] -> [B, 1, 1, C]."""
    return x.permute(NCHW).mean((2, 3), True).permute(NHWC)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return F.batch_norm(x.permute(NCHW), mean, var, weight, bias, False, 0.0, eps).permute(NHWC)
