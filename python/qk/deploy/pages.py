"""Memory that the system maps in large pieces."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of a large CPU tensor in pages of 2 MB, where the system has them; else x itself.

    With pages of 4 KB a lookup that reads two cache lines from anywhere spends longer on finding them than on reading,
    and a stream of weights stops at the end of every page, where the processor fetches nothing ahead.
    """
    if x.device.type != "cpu" or x.nbytes < 2 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return x
    memory = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        return x
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)
