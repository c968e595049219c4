"""Some columns of codes: the channels that some groups of a convolution read."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device


def index_select(codes: Tensor, index: Tensor) -> Tensor:
    """codes[..., index].

    codes: [..., C], uint8. index: int32 [count].
    Returns [..., count], contiguous.
    Raises RuntimeError for another dtype or device, and on the CPU for a column that there is not.
    """
    return torch.ops.qk.index_select(codes, index)


def reference(codes: Tensor, index: Tensor) -> Tensor:
    """The definition."""
    return codes[..., index.long()].contiguous()


@torch.library.register_fake("qk::index_select")
def _(codes, index):
    on_one_device("index_select", codes, index)
    if codes.dim() == 0 or index.dim() != 1:
        got = f"{list(codes.shape)} and {list(index.shape)}"
        raise RuntimeError(f"qk::index_select: codes and index must be [..., C] and [count], got {got}.")
    return torch.empty((*codes.shape[:-1], index.shape[0]), dtype=torch.uint8, device=codes.device)
