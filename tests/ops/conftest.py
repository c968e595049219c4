"""What the tests of the integer operators share: random weights in every form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import qk


@dataclass
class Weight:
    codes: Tensor  # of `shape`
    zero: Tensor  # [N] or [N, groups along K]
    step: Tensor
    packed: Tensor  # at rest
    prepacked: Tensor
    bits: int  # stored


def weight(shape, code_bits, device="cpu", groups=1, k_groups=1, extreme=False, seed=0) -> Weight:
    """extreme: every code and zero at an end, where sums are largest."""
    random = torch.Generator().manual_seed(seed)
    n, k, bits = shape[0], torch.Size(shape[1:]).numel(), 4 if code_bits == 3 else code_bits
    top = 2**code_bits - 1
    per = (n,) if k_groups == 1 else (n, k_groups)
    codes = torch.randint(0, top + 1, (n, k), generator=random)
    zero = torch.randint(0, top + 1, per, generator=random)
    if extreme:
        codes, zero = (codes > top // 2) * top, (zero > top // 2) * top
    if bits == 8:
        zero = torch.full_like(zero, 128)
    codes, zero = codes.to(torch.uint8).to(device), zero.to(torch.int32).to(device)
    step = (0.001 + torch.rand(per, generator=random)).to(device)
    packed = qk.ops.pack(codes, bits)
    prepacked = qk.ops.prepack(packed, zero, bits, shape, groups)
    return Weight(codes.reshape(shape), zero, step, packed, prepacked, bits)


@pytest.fixture
def make_weight():
    return weight
