"""zentorch: int8 and 4-bit linear layers of AOCL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import zentorch  # noqa: F401  registers the operators
from torch import Tensor

from qk.bench.problems import Bag, Gemm
from qk.bench.rows import Candidate, meets

PACKAGES = ("zentorch",)
KEPT: list[Tensor] = []
DYNAMIC_ERROR = 0.15  # activations rounded to 8 bits, and to bfloat16 for 4-bit weights


def _candidate(name: str, family: str, run: Callable[[], Tensor], expected: Tensor, tolerance: float) -> Candidate:
    return Candidate(f"zentorch {name}", family, run, lambda: meets(run(), expected, tolerance))


def gemm(p: Gemm, threads: int) -> Iterable[Candidate]:
    d, z = p.data, torch.ops.zentorch
    # It packs a weight at its first call and finds it again by its address: no later weight may lie there. Prepacked by
    # its own operator the result was wrong for K other than N (2.13.0.2).
    KEPT.append(d.w_codes)
    run = partial(z.zentorch_dynamic_qlinear, d.x, d.w_codes, d.w_step, d.bias)
    yield _candidate("int8 dynamic", "W8", run, d.y, DYNAMIC_ERROR)
    x_step, zero, zeros = torch.tensor([d.x_step]), torch.tensor([0], dtype=torch.int32), torch.zeros(p.n).int()
    weight = (d.w_codes, x_step, zero, d.w_step, zeros, d.bias)
    run = partial(z.zentorch_qlinear, d.x_codes, *weight, None, None, torch.float32)
    yield _candidate("int8 static", "W8", run, d.y, 1e-2)
    codes, step, product = d.blocks(4, p.k)
    packed = z.zentorch_woq_repack_weight(codes[:, 0])
    KEPT.append(packed)
    run = partial(
        z.zentorch_dynamic_qlinear,
        d.x.bfloat16(),
        packed,
        step.reshape(1, -1),
        d.bias.bfloat16(),
    )
    yield _candidate("W4A8", "W4", run, product + d.bias, DYNAMIC_ERROR)


def bag(p: Bag, threads: int) -> Iterable[Candidate]:
    rows = p.data.table(4)
    rows = rows.reshape(len(rows), -1, 4).contiguous().view(torch.int32).reshape(len(rows), -1)
    args = (rows, p.data.indices, p.data.offsets, 4, torch.float32)
    run = partial(torch.ops.zentorch.zentorch_quant_embedding_bag, *args)
    yield _candidate("4-bit rows", "W4", run, p.data.expected(4), 0.02)
