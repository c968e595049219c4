"""torch itself: float32, bfloat16, and its int8 operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.bench.problems import Bag, Conv, Gemm
from qk.bench.rows import Candidate, meets

PACKAGES = ("torch",)
BFLOAT16_ERROR = 0.15  # standard deviations: 8 bits of mantissa, the largest of millions of values
INT8_ERROR = 0.1  # of exact sums, quantized to 8 bits over the range of the result

warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")


def _engines() -> list[str]:
    """x86 takes one of these two."""
    return [engine for engine in ("onednn", "fbgemm") if engine in torch.backends.quantized.supported_engines]


def _candidate(name: str, family: str, run: Callable[[], Tensor], expected: Tensor, tolerance: float) -> Candidate:
    def check() -> None:
        got = run()
        meets(got.dequantize() if got.is_quantized else got, expected, tolerance)

    return Candidate(f"torch {name}", family, run, check)


def gemm(p: Gemm, threads: int) -> Iterable[Candidate]:
    d = p.data
    x, w = d.x, d.w
    yield _candidate("float32", "float32", partial(F.linear, x, w, d.bias), d.y, 1e-3)
    low = [t.bfloat16() for t in (x, w, d.bias)]
    yield _candidate("bfloat16", "bfloat16", partial(F.linear, *low), d.y, BFLOAT16_ERROR)

    signed, sums = (d.x_codes.int() - 128).to(torch.int8), d.w_codes.int().sum(1)
    int_mm = partial(torch._int_mm, signed, d.w_codes.t())

    def check() -> None:
        meets((int_mm() + 128 * sums) * (d.w_step * d.x_step) + d.bias, d.y, 1e-3)

    yield Candidate("torch._int_mm", "W8", int_mm, check)
    codes = d.y.clamp(0, 255 * d.out_step)
    qx = torch._make_per_tensor_quantized_tensor(d.x_codes, d.x_step, 0)
    qw = _per_channel(d.w_codes, d.w_step)
    for engine in _engines():
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(qw, d.bias)
        run = partial(torch.ops.quantized.linear, qx, packed, d.out_step, 0)
        yield _candidate(f"int8 {engine}", "W8", run, codes, INT8_ERROR)
    if hasattr(torch.ops.onednn, "qlinear_prepack"):
        packed = torch.ops.onednn.qlinear_prepack(d.w_codes, [p.m, p.k])
        zero = torch.zeros(p.n, dtype=torch.int32)
        weight = (packed, d.w_step, zero, d.bias)
        out = (1.0, 0, torch.float32, "none", [], "")
        run = partial(torch.ops.onednn.qlinear_pointwise, d.x_codes, d.x_step, 0, *weight, *out)
        yield _candidate("int8 onednn to float32", "W8", run, d.y, 1e-3)


def conv(p: Conv, threads: int) -> Iterable[Candidate]:
    d = p.data
    at = (p.stride, p.padding, 1, p.groups)
    yield _candidate("float32", "float32", partial(F.conv2d, d.x, d.w, d.bias, *at), d.y, 1e-3)
    low = [t.bfloat16() for t in (d.x, d.w, d.bias)]
    yield _candidate("bfloat16", "bfloat16", partial(F.conv2d, *low, *at), d.y, BFLOAT16_ERROR)
    codes = d.y.clamp(0, 255 * d.out_step)
    qx = torch._make_per_tensor_quantized_tensor(d.x_codes.permute(0, 3, 1, 2), d.x_step, 0)
    qw = _per_channel(d.w_codes, d.w_step)
    for engine in _engines():
        torch.backends.quantized.engine = engine
        pairs = ([p.stride] * 2, [p.padding] * 2, [1, 1])
        packed = torch.ops.quantized.conv2d_prepack(qw, d.bias, *pairs, p.groups)
        run = partial(torch.ops.quantized.conv2d, qx, packed, d.out_step, 0)
        yield _candidate(f"int8 {engine}", "W8", run, codes, INT8_ERROR)  # fbgemm's depthwise saturates and fails this


def bag(p: Bag, threads: int) -> Iterable[Candidate]:
    table, expected = p.data.values(8), p.data.expected(8)
    run = partial(F.embedding_bag, p.data.indices, table, p.data.offsets, mode="sum")
    yield _candidate("float32", "float32", run, expected, 1e-3)
    run = partial(F.embedding_bag, p.data.indices, table.bfloat16(), p.data.offsets, mode="sum")
    yield _candidate("bfloat16", "bfloat16", run, expected, BFLOAT16_ERROR)
    for bits, name in ((8, "byte"), (4, "4bit"), (2, "2bit")):
        operator = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
        rows = p.data.table(bits)
        run = partial(operator, rows, p.data.indices, p.data.offsets)
        yield _candidate(f"{bits}-bit rows", f"W{bits}", run, p.data.expected(bits), 0.02)


def network(net: Any, threads: int, cache: Path) -> Iterable[Candidate]:
    for dtype, family, tolerance in ((torch.float32, "float32", 1e-3), (torch.bfloat16, "bfloat16", 0.5)):
        model, inputs = net.copy(dtype), tuple(_like(t, dtype) for t in net.inputs)

        def run(model: Any = model, inputs: Any = inputs) -> Tensor:
            with torch.inference_mode():
                return model(*inputs)

        def check(run: Callable[[], Tensor] = run, tolerance: float = tolerance) -> None:
            net.close(run().float(), tolerance)

        yield Candidate(f"torch {family} eager, channels-last", family, run, check)


def _per_channel(codes: Tensor, step: Tensor) -> Tensor:
    zeros = torch.zeros(len(step), dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(codes, step.double(), zeros, 0)


def _like(t: Tensor, dtype: torch.dtype) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.to(dtype, memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format)
