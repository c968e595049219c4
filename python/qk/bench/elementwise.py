"""Operators that compute little: what they can reach is the bandwidth of the memory that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from qk import ops
from qk.bench.harness import Case
from qk.bench.problems import Bag
from qk.bench.rows import Candidate, meets
from qk.deploy.embedding import QEmbeddingBag
from qk.ops.quantize import reference as quantize_reference


def bag(p: Bag, threads: int) -> Iterable[Candidate]:
    """Sums of rows of 8, 4 and 2 bits, looked up by the module that a converted model has."""
    d = p.data
    for bits in (8, 4, 2):
        table = QEmbeddingBag(d.table(bits), bits, p.cols, dtype="float32" if bits == 8 else "float16")
        run = partial(table, d.indices, d.offsets)
        expected = d.expected(bits)  # in another order of sums
        lines = -(-table.rows.shape[1] // 64) * 64  # a row comes in whole lines of the cache
        moved = d.lookups * lines + p.bags * p.cols * 4
        name = f"qk {bits}-bit rows"
        yield Candidate(name, f"W{bits}", run, lambda r=run, e=expected: meets(r(), e, 1e-3), moved)


def cases() -> Iterable[tuple[str, str, Callable[[], Case]]]:
    """Kind, name and maker. Those of residual networks have the sizes of ResNet's first stage."""
    yield "elementwise", "quantize 1M values", partial(quantize, 1 << 20)
    image = (1, 56, 56, 256)
    if hasattr(ops, "add"):
        yield "elementwise", "add codes 56x56x256", partial(add, image)
    if hasattr(ops, "pool"):
        yield "elementwise", "pool max 3x3/2 112x112x64", partial(pool, (1, 112, 112, 64))
    if hasattr(ops, "lookup"):
        yield "elementwise", "lookup 56x56x256", partial(lookup, image)


def quantize(values: int) -> Case:
    x = torch.randn(1, values)
    step, zero = torch.tensor([0.05]), torch.tensor([128], dtype=torch.int32)

    def check() -> None:
        assert torch.equal(ops.quantize(x, step, zero, 8), quantize_reference(x, step, zero, 8))

    theirs = partial(torch.quantize_per_tensor, x, 0.05, 128, torch.quint8)
    return Case("quantize", check, partial(ops.quantize, x, step, zero, 8), {"torch": theirs}, 5 * values)


def _codes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def add(shape: tuple[int, ...]) -> Case:
    from qk.ops.add import reference

    a, b, zero = _codes(shape), _codes(shape).flip(1).contiguous(), torch.tensor([3], dtype=torch.int32)
    steps = [torch.tensor([s]) for s in (0.02, 0.03, 0.04)]
    args = (a, steps[0], zero, b, steps[1], zero, "relu", steps[2], zero)

    def check() -> None:
        assert torch.equal(ops.add(*args), reference(*args))

    qa, qb = (torch._make_per_tensor_quantized_tensor(t, float(s), 3) for t, s in zip((a, b), steps, strict=False))
    theirs = partial(torch.ops.quantized.add_relu, qa, qb, float(steps[2]), 3)
    return Case("add", check, partial(ops.add, *args), {"torch": theirs}, 3 * a.numel())


def pool(shape: tuple[int, ...]) -> Case:
    from qk.ops.pool import reference

    x, step, zero = _codes(shape), torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32)
    args = (x, step, zero, "max", (3, 3), (2, 2), (1, 1))

    def check() -> None:
        assert torch.equal(ops.pool(*args), reference(*args))

    qx = torch._make_per_tensor_quantized_tensor(x.permute(0, 3, 1, 2), 0.02, 3)
    theirs = partial(torch.nn.functional.max_pool2d, qx, 3, 2, 1)
    return Case("pool", check, partial(ops.pool, *args), {"torch": theirs}, x.numel() * 5 // 4)


def lookup(shape: tuple[int, ...]) -> Case:
    codes, table = _codes(shape), torch.arange(256).flip(0).to(torch.uint8)

    def check() -> None:
        assert torch.equal(ops.lookup(codes, table), table[codes.long()])

    theirs = partial(torch.take, table, codes.long())
    return Case("lookup", check, partial(ops.lookup, codes, table), {"torch take": theirs}, 2 * codes.numel())
