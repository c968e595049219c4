"""Max and average pooling of codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.ops._epilogue import result_dtype
from qk.ops._rows import on_one_device
from qk.ops._values import result


def pool(
    x: Tensor,
    x_step: Tensor,
    x_zero: Tensor,
    mode: str,
    kernel: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """mode max: the largest code of each window. mode average: step * sum (x - zero) / count, the sum exact.

    x: [B, H, W, C] (NHWC), uint8 codes. x_step: float32 and x_zero: int32, one value each. kernel: the whole image
    without one. stride: the kernel without one. Window, sizes and count are those of torch's max_pool2d and avg_pool2d.
    The average is float(sum) * (step / count), each operation rounded; activation and out_step follow as in `add`.
    Returns [B, OH, OW, C], contiguous. max: uint8 codes of x's step; a window that lies in the padding gives 0.
    average: float32, or uint8 codes with out_step.
    Raises RuntimeError for another dtype, device or shape, for sizes that torch's pools refuse, for a result's step or
    activation with max, and on the CPU for a step or zero outside its range.
    """
    kernel = tuple(x.shape[1:3]) if kernel is None else kernel
    return torch.ops.qk.pool(
        x,
        x_step,
        x_zero,
        mode,
        kernel,
        kernel if stride is None else stride,
        padding,
        dilation,
        ceil_mode,
        count_include_pad,
        divisor_override,
        activation,
        out_step,
        out_zero,
        out_bits,
    )


def reference(
    x: Tensor,
    x_step: Tensor,
    x_zero: Tensor,
    mode: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """The definition. Codes and sums are exact in float64."""
    image = x.double().permute(0, 3, 1, 2)
    if mode == "max":
        largest = F.max_pool2d(image, kernel, stride, padding, dilation, ceil_mode)
        return largest.clamp(min=0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    window = (kernel, stride, padding, ceil_mode)
    sums = F.avg_pool2d(image - x_zero.double(), *window, divisor_override=1)
    inside = F.avg_pool2d(torch.ones_like(image[:1, :1]), *window, divisor_override=1)
    if divisor_override is not None:
        count = torch.full_like(inside, divisor_override)
    elif count_include_pad:
        # The average of ones over a window that counts its padding is inside / count.
        count = (inside / F.avg_pool2d(torch.ones_like(image[:1, :1]), *window)).round()
    else:
        count = inside
    y = sums.float() * (x_step.reshape(1) / count.float())
    return result(y.permute(0, 2, 3, 1).contiguous(), activation, out_step, out_zero, out_bits)


@torch.library.register_fake("qk::pool")
def _(
    x,
    x_step,
    x_zero,
    mode,
    kernel,
    stride,
    padding=(0, 0),
    dilation=(1, 1),
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
    activation="none",
    out_step=None,
    out_zero=None,
    out_bits=8,
):
    on_one_device("pool", x, x_step, x_zero, out_step, out_zero)
    if x.dim() != 4:
        raise RuntimeError(f"qk::pool: x must have 4 dimensions, got {list(x.shape)}.")
    sizes = []
    for i, size in enumerate(x.shape[1:3]):
        k, s, p, d = (v[i] if len(v) == 2 else v[0] for v in (kernel, stride, padding, dilation))
        out = (size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        sizes.append(out - 1 if ceil_mode and (out - 1) * s >= size + p else out)
    dtype = torch.uint8 if mode == "max" else result_dtype(out_step)
    return x.new_empty((x.shape[0], *sizes, x.shape[3]), dtype=dtype)
