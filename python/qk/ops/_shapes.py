"""Shapes in a program (`qk.ops._program`): of every value that its steps make, and of its results."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from qk.ops._program import Output, Program, Step

Shape = Sequence[Any]  # of int or SymInt


def shapes(program: Program, inputs: Sequence[Shape]) -> dict[int, tuple[Any, ...]]:
    """Shape of every value by id, from those of the inputs. Sizes may be symbols.

    Raises RuntimeError, naming the step, for shapes that do not fit.
    """
    if len(inputs) != len(program.inputs):
        raise RuntimeError(f"qk::network: inputs must be {len(program.inputs)} tensors, got {len(inputs)}.")
    known = {value.id: tuple(shape) for value, shape in zip(program.inputs, inputs, strict=True)}
    for step in program.steps:
        known[step.out] = step_shape(step, [known[id] for id in step.inputs])
    return known


def output_shape(output: Output, shape: Shape) -> tuple[Any, ...]:
    """The shape of a result, from that of its value."""
    if output.layout == "same":
        return tuple(shape)
    if len(shape) != 4:
        raise RuntimeError(f"qk::network: output {output.value} must be [B, H, W, C] for layout nchw, got {shape}.")
    return (shape[0], shape[3], shape[1], shape[2])


def _misfit(step: Step, what: str) -> RuntimeError:
    return RuntimeError(f"qk::network: {step.op} {step.out}: {what}.")


def step_shape(step: Step, ins: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Shape of what a step makes."""
    x, a = ins[0], step.attributes
    if step.op == "quantize" and a["layout"] == "nchw":
        if len(x) < 3:
            raise _misfit(step, f"the input must be [B, C, ...], got {list(x)}")
        return (x[0], *x[2:], x[1])
    if step.op in ("conv2d", "pool", "multiply") and len(x) != 4:
        raise _misfit(step, f"the input must be [B, H, W, C], got {list(x)}")
    if step.op in ("conv2d", "gemm"):
        y = (*x[:-1], a["n"]) if step.op == "gemm" else (x[0], *_window(step, x), a["n"])
        if len(ins) == 2 and not _same(ins[1], y):
            raise _misfit(step, f"the residual must be {list(y)}, got {list(ins[1])}")
        return y
    if step.op == "pool":
        return (x[0], 1, 1, x[3]) if a["kernel"] == (0, 0) else (x[0], *_window(step, x), x[3])
    if step.op == "add" and not _same(x, ins[1]):
        raise _misfit(step, f"the inputs must have one shape, got {list(x)} and {list(ins[1])}")
    if step.op == "multiply" and not _same(ins[1], (x[0], 1, 1, x[3])):
        raise _misfit(step, f"the gate must be {[x[0], 1, 1, x[3]]}, got {list(ins[1])}")
    if step.op == "concat":
        for other in ins[1:]:
            if not _same(other[:-1], x[:-1]):
                raise _misfit(step, f"the inputs must agree but for the last size, got {list(x)} and {list(other)}")
        return (*x[:-1], sum(other[-1] for other in ins))
    if step.op == "index_put":
        if not x or not _same(ins[1][:-1], x[:-1]) or len(ins[1]) != len(x):
            raise _misfit(step, f"the inputs must agree but for the last size, got {list(x)} and {list(ins[1])}")
        if len(ins) == 3 and not _same(ins[2], x):
            raise _misfit(step, f"the residual must be {list(x)}, got {list(ins[2])}")
    if step.op in ("sparq", "index_select") and not x:
        raise _misfit(step, "the input must be [..., cols], got []")
    if step.op == "index_select":
        return (*x[:-1], a["count"])
    if step.op == "attention":
        return _attended(step, *ins)
    if step.op == "reshape":
        return _reshaped(step, x)
    return x


def _same(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(p == q for p, q in zip(a, b, strict=True))


def _window(step: Step, x: tuple[Any, ...]) -> list[Any]:
    a = step.attributes
    sides = []
    for size, k, s, p, d in zip(x[1:3], *(a[n] for n in ("kernel", "stride", "padding", "dilation")), strict=True):
        spare = size + 2 * p - d * (k - 1) - 1
        if spare < 0:
            raise _misfit(step, f"the kernel reaches {d * (k - 1) + 1} and the padded input is {size + 2 * p}")
        side = (spare + (s - 1 if a.get("ceil_mode") else 0)) // s + 1
        if a.get("ceil_mode") and (side - 1) * s >= size + p:  # as torch: no window begins in the padding on the right
            side = side - 1
        sides.append(side)
    return sides


def _attended(step: Step, q: Shape, k: Shape, v: Shape, mask: Shape | None = None) -> tuple[Any, ...]:
    heads = step.attributes["heads"]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x) != 3 or x[2] < heads or x[2] % heads:
            raise _misfit(step, f"{name} must be [B, rows, heads * D] for {heads} heads, got {list(x)}")
    if not _same((q[0], q[2]), (k[0], k[2])) or not _same(k[:2], v[:2]):
        raise _misfit(step, f"q, k and v must fit each other, got {list(q)}, {list(k)} and {list(v)}")
    if mask is not None and not (
        len(mask) == 3 and mask[2] == k[1] and (mask[0] == 1 or mask[0] == k[0]) and (mask[1] == 1 or mask[1] == q[1])
    ):
        raise _misfit(step, f"the mask must be [B or 1, queries or 1, keys], got {list(mask)}")
    return (q[0], q[1], v[2])


def _reshaped(step: Step, x: tuple[Any, ...]) -> tuple[Any, ...]:
    wanted = step.attributes["shape"]
    if any(n == 0 and i >= len(x) for i, n in enumerate(wanted)):
        raise _misfit(step, f"shape {list(wanted)} copies a size that {list(x)} does not have")
    sizes = [x[i] if n == 0 else n for i, n in enumerate(wanted)]
    if -1 not in wanted:
        if prod(sizes) != prod(x):
            raise _misfit(step, f"{list(x)} cannot become {sizes}")
        return tuple(sizes)
    # Sizes that are copied cancel, so that an empty or symbolic batch leaves the rest known.
    kept = [i for i, n in enumerate(wanted) if n == 0]
    rest = prod(x[i] for i in range(len(x)) if i not in kept)
    others = prod(n for n in wanted if n > 0)
    if rest % others:
        raise _misfit(step, f"{list(x)} cannot become {sizes}")
    sizes[wanted.index(-1)] = rest // others
    return tuple(sizes)
