"""Our kernels as candidates: the same layers in every width, each held against its definition bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qk import ops
from qk.bench.problems import Conv, Gemm
from qk.bench.rows import Candidate, same_bits
from qk.deploy.program import Builder, encode
from qk.ops.conv2d import reference as conv2d_reference
from qk.ops.gemm import reference as gemm_reference
from qk.ops.quantize_rows import reference as quantize_rows_reference

GEMM_WIDTHS = (8, 4, 2)
CONV_WIDTHS = ((8, 8), (4, 8), (4, 6), (4, 4), (2, 8))
GROUP = 128  # weights that share a step where a product is dynamic, as the peers have it
CHECKED_ROWS = 24  # of a large product: the definition computes in float64


def gemm(p: Gemm, threads: int) -> Iterable[Candidate]:
    """Codes in and out, and float32 in and out with a step for each row of x (dynamic)."""
    for bits in GEMM_WIDTHS:
        yield _static(p, bits)
    for bits in GEMM_WIDTHS:
        yield _dynamic(p, bits, 1 if bits == 8 or p.k % GROUP else p.k // GROUP)


def conv(p: Conv, threads: int) -> Iterable[Candidate]:
    """Codes in and out, in every width; where a weight can be transformed for Winograd, that way too."""
    for bits, x_bits in CONV_WIDTHS:
        yield _conv(p, bits, x_bits, "direct")
        if has_winograd() and p.kernel == 3 and p.stride == 1 and p.groups == 1 and bits <= 4 and x_bits <= 6:
            yield _conv(p, bits, x_bits, "winograd")


def has_winograd() -> bool:
    """Whether this build's prepack takes an algorithm; the kernel may come later."""
    if "algorithm" not in inspect.signature(ops.prepack).parameters:
        return False
    codes = torch.zeros(16, 16 * 9, dtype=torch.uint8)
    zero = torch.zeros(16, dtype=torch.int32)
    try:
        ops.prepack(ops.pack(codes, 4), zero, 4, (16, 3, 3, 16), algorithm="winograd")
    except RuntimeError:
        return False
    return True


def _weight(n: int, k: int, bits: int, k_groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes [N, K], their zeros and steps."""
    rng = torch.Generator().manual_seed(n + k + bits)
    per = (n,) if k_groups == 1 else (n, k_groups)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=rng)
    return codes, torch.full(per, 2 ** (bits - 1), dtype=torch.int32), 0.01 + 0.01 * torch.rand(per, generator=rng)


def _out_step(sample: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
    """Step and zero that hold most of the float result, behind a ReLU of what it leaves."""
    deviations, zero = (3, 0) if relu else (6, 128)
    return (sample.std() * deviations / 255).reshape(1).clamp(min=1e-6), torch.tensor([zero], dtype=torch.int32)


def _static(p: Gemm, bits: int) -> Candidate:
    x = p.data.x_codes
    codes, zero, step = _weight(p.n, p.k, bits)
    prepacked = ops.prepack(ops.pack(codes, bits), zero, bits, (p.n, p.k))
    x_step, x_zero, bias = torch.tensor([p.data.x_step]), torch.tensor([7], dtype=torch.int32), p.data.bias
    checked = _some_rows(p.m)
    out = _out_step(gemm_reference(x[checked], x_step, x_zero, codes, zero, step, bias))
    product = {"weight": prepacked, "weight_step": step, "bias": bias, "bits": bits}
    run = _one_layer("gemm", x, (x_step, x_zero, 8), out, **product, activation="none")

    def check() -> None:
        expected = gemm_reference(x[checked], x_step, x_zero, codes, zero, step, bias, "none", *out)
        same_bits(run()[checked], expected)

    moved = p.n * p.k * bits // 8 + p.m * (p.k + p.n)
    return Candidate(f"qk W{bits}A8", f"W{bits}A8", run, check, moved)


def _one_layer(
    op: str, x: Tensor, x_scale: tuple[Tensor, Tensor, int], out_scale: tuple[Tensor, Tensor], **named: Any
) -> Callable[[], Tensor]:
    """A network of one layer, codes in and out: what `fuse` makes of it, as the peers' are compiled models of one."""
    builder = Builder()
    given = builder.input(builder.scale(*x_scale))
    builder.output(builder.step(op, given, scale=builder.scale(*out_scale, 8), **named))
    constants, program = builder.constants(), encode(builder.program())
    return lambda: torch.ops.qk.network.default([x], constants, program)[0]


def _dynamic(p: Gemm, bits: int, k_groups: int) -> Candidate:
    x, bias = p.data.x, p.data.bias
    codes, zero, step = _weight(p.n, p.k, bits, k_groups)
    prepacked = ops.prepack(ops.pack(codes, bits), zero, bits, (p.n, p.k))

    def run() -> Tensor:
        return ops.gemm(*ops.quantize_rows(x, 8), prepacked, step, bias, bits)

    def check() -> None:
        at = _some_rows(p.m)
        same_bits(run()[at], gemm_reference(*quantize_rows_reference(x[at], 8), codes, zero, step, bias))

    groups = f" g{GROUP}" if k_groups > 1 else ""
    moved = p.n * p.k * bits // 8 + 4 * p.n * k_groups + 4 * p.m * (p.k + p.n)
    return Candidate(f"qk W{bits}A8{groups} dynamic", f"W{bits}A8 dynamic", run, check, moved)


def _some_rows(m: int) -> Tensor:
    """All rows of a small product; of a large one the first, the last and some between."""
    if m <= CHECKED_ROWS:
        return torch.arange(m)
    return torch.linspace(0, m - 1, CHECKED_ROWS).round().long().unique()


def _conv(p: Conv, bits: int, x_bits: int, algorithm: str) -> Candidate:
    x = p.data.x_codes >> (8 - x_bits)
    shape = (p.outputs, p.kernel, p.kernel, p.channels // p.groups)
    codes, zero, step = _weight(p.outputs, p.k, bits)
    more = {} if algorithm == "direct" else {"algorithm": algorithm}
    prepacked = ops.prepack(ops.pack(codes, bits), zero, bits, shape, p.groups, **more)
    x_step, x_zero, bias = torch.tensor([p.data.x_step]), torch.tensor([0], dtype=torch.int32), p.data.bias
    at = ((p.stride,) * 2, (p.padding,) * 2, (1, 1), p.groups)
    reference: Callable[..., Tensor] = partial(
        conv2d_reference, x, x_step, x_zero, codes.reshape(shape), zero, step, bias, *at
    )
    out = _out_step(reference(), relu=True)
    product = {"weight": prepacked, "weight_step": step, "bias": bias, "bits": bits, "kernel": (p.kernel,) * 2}
    places = dict(zip(("stride", "padding", "dilation", "groups"), at, strict=True))
    run = _one_layer("conv2d", x, (x_step, x_zero, x_bits), out, **product, **places, activation="relu")

    def check() -> None:
        same_bits(run(), reference("relu", *out))

    moved = codes.numel() * bits // 8 + x.numel() + p.data.y.numel()
    family = f"W{bits}A{x_bits}"
    name = family + (f" {algorithm}" if algorithm != "direct" else "")
    return Candidate(f"qk {name}", family, run, check, moved)
