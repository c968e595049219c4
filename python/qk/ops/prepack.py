"""A weight in the order in which the kernels read it: made once, when a model is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from qk._core import packed_layout
from qk.ops._rows import on_one_device


def prepack(
    packed: Tensor, zero: Tensor, bits: int, shape: tuple[int, ...], groups: int = 1, algorithm: str = "direct"
) -> Tensor:
    """The kernels' own layout of a packed weight, for `gemm` and `conv2d`.

    packed: [N, row_bytes], uint8, from `pack` of codes [N, K]. zero: int32, [N] or [N, groups along K], a code each;
    128 for 8-bit weights. bits: 2, 4 or 8. shape: (N, K) for gemm; (N, kh, kw, C / groups) for conv2d, which makes
    K = kh * kw * C / groups. groups: of the convolution. algorithm: "direct", or "winograd" on the CPU for
    3 x 3 kernels of 2 or 4 bits, which conv2d then takes with stride and dilation 1 and x_bits up to 6: the same bits
    from fewer products (docs/winograd.md).
    Returns uint8 [bytes], good for every instruction set of the device it lies on; never store it, store `packed`.
    Raises RuntimeError for another shape, dtype or width, groups that do not divide N, a zero that is no code, a K
    so long that no sum could stay in int32, or a weight that the algorithm cannot have.
    """
    return torch.ops.qk.prepack(packed, zero, bits, shape, groups, algorithm)


def reference(codes: Tensor, zero: Tensor, bits: int, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The definition of what a prepacked weight stands for: code - zero, int32, of `shape`. codes: [N, K]."""
    n = shape[0]
    rows = codes.reshape(zero.numel(), -1).to(torch.int32) - zero.reshape(-1, 1)
    return rows.reshape(n, *shape[1:])


@torch.library.register_fake("qk::prepack")
def _(packed, zero, bits, shape, groups=1, algorithm="direct"):
    on_one_device("prepack", packed, zero)
    k_groups = 1 if zero.dim() < 2 else zero.shape[1]
    layout = packed_layout(
        [int(s) for s in shape], bits, groups, int(k_groups), packed.device.type == "cuda", algorithm == "winograd"
    )
    return packed.new_empty(layout["bytes"])
