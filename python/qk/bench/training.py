"""The operators of learning, forward and backward, against eager torch, torch.compile and torch's own operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qk import ops
from qk.bench.harness import Case, Run, forward_backward
from qk.ops.fisher_loss import reference as fisher_loss_reference
from qk.ops.lsq import reference as lsq_reference
from qk.ops.lsq import reference_backward as lsq_reference_backward
from qk.ops.soft_round import reference as soft_round_reference

BITS = 4
COMPILING = 3  # runs in which torch.compile may still compile
LSQ_SHAPES = [(1024, 1024, 1), (1024, 1024, 1024), (4096, 4096, 1), (4096, 4096, 4096)]  # rows, cols, steps
SOFT_ROUND_SHAPES = {"resnet18 layer4.1.conv2": (512, 512, 3, 3), "1M": (1024, 1024), "16M": (4096, 4096)}
FISHER_SHAPES = {"resnet18 layer1, batch 32 of 224x224": (32, 64, 56, 56), "1M": (1024, 1024), "16M": (4096, 4096)}


def _peers(eager: Callable[..., Tensor], compiled: bool) -> dict[str, Callable[..., Tensor]]:
    return {"eager torch": eager} | ({"torch.compile": torch.compile(eager, dynamic=False)} if compiled else {})


def _settled(run: Run) -> Run:
    """With some runs before its first: torch.compile may compile more than once."""
    first = True

    def call() -> object:
        nonlocal first
        for _ in range(COMPILING if first else 0):
            run()
        first = False
        return run()

    return call


def _steps(functions: dict[str, Callable[..., Tensor]], *leaves: Tensor, grad: Tensor) -> dict[str, Run]:
    """A training step of each."""
    return {name: _settled(forward_backward(function, *leaves, grad=grad)) for name, function in functions.items()}


def lsq(rows: int, cols: int, steps: int, compiled: bool = False) -> Case:
    """Learned step sizes: value, and the gradients of x and step."""

    def eager(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        """Rounding and clamping under autograd with a straight-through round."""
        s = step.reshape(-1, *[1] * (x.dim() - 1)) if step.numel() > 1 else step
        low = -zero.reshape(s.shape).float()
        t = torch.minimum(torch.maximum(x / s, low), low + (2**BITS - 1))
        return (t + (t.round() - t).detach()) * s

    def learnable(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        top = 2**BITS - 1
        if step.numel() > 1:
            return torch._fake_quantize_learnable_per_channel_affine(x, step, zero.float(), 0, 0, top, 1.0)
        return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero.float(), 0, top, 1.0)

    def ours(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        return ops.lsq(x, step, zero, BITS)

    torch.manual_seed(0)
    x = torch.randn(rows, cols, requires_grad=True)
    step = (0.2 + 0.2 * torch.rand(steps)).requires_grad_()
    zero = torch.full((steps,), 8, dtype=torch.int32)
    grad = torch.randn(rows, cols)

    def check() -> None:
        assert torch.equal(ours(x, step, zero), lsq_reference(x, step, zero, BITS))
        got = torch.autograd.grad(ours(x, step, zero), (x, step), grad)
        want = lsq_reference_backward(grad, x, step, zero, BITS)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-2)  # a float sum of up to 16M terms

    peers = _peers(eager, compiled) | {"torch learnable": learnable}
    return Case(
        name=f"lsq fwd+bwd {x.numel() >> 20}M, {'per tensor' if steps == 1 else 'per row'}",
        check=check,
        ours=forward_backward(ours, x, step, zero, grad=grad),
        peers=_steps(peers, x, step, zero, grad=grad),
        moved_bytes=x.numel() * 4 * 5,  # forward reads x, writes out; backward reads x and grad, writes grad of x
    )


def soft_round(name: str, shape: tuple[int, ...], compiled: bool = False, device: str = "cpu") -> Case:
    """Soft rounding of weights: value, and the gradient of v."""
    random = torch.Generator().manual_seed(0)
    weight, v, grad = (torch.randn(shape, generator=random).to(device) for _ in range(3))
    step = (0.2 + 0.2 * torch.rand(shape[0], generator=random)).to(device)
    zero = torch.full((shape[0],), 8, dtype=torch.int32, device=device)
    v.requires_grad_()

    def ours(v: Tensor) -> Tensor:
        return ops.soft_round(weight, v, step, zero, BITS)

    def eager(v: Tensor) -> Tensor:
        return soft_round_reference(weight, v, step, zero, BITS)

    def check() -> None:
        torch.testing.assert_close(ours(v), eager(v), rtol=0, atol=1e-5)
        got, want = (torch.autograd.grad(f(v), v, grad)[0] for f in (ours, eager))
        assert ((got - want).abs() > 1e-5).sum() <= 1e-5 * v.numel()  # edges of the clamps

    return Case(
        name=f"soft_round fwd+bwd {name}",
        check=check,
        ours=forward_backward(ours, v, grad=grad),
        peers=_steps(_peers(eager, compiled), v, grad=grad),
        moved_bytes=v.numel() * 4 * 7,  # forward: weight, v, out; backward: grad, weight, v, grad of v
    )


def fisher_loss(
    name: str, shape: tuple[int, ...], weighted: bool = True, compiled: bool = False, device: str = "cpu"
) -> Case:
    """The weighted reconstruction loss: value and gradient."""
    random = torch.Generator().manual_seed(0)
    output, target, g = (torch.randn(shape, generator=random).to(device) for _ in range(3))
    weight = g.square() if weighted else None
    scale = shape[1] / output.numel()
    grad = torch.ones((), device=device)
    output.requires_grad_()

    def ours() -> tuple[Tensor, Tensor]:
        return ops.fisher_loss_and_slope(output, target, weight, scale)

    def eager(output: Tensor) -> Tensor:
        return fisher_loss_reference(output, target, weight, scale)[0]

    def check() -> None:
        loss, slope = ours()
        torch.testing.assert_close(loss, eager(output), rtol=1e-4, atol=0)
        torch.testing.assert_close(slope, torch.autograd.grad(eager(output), output, grad)[0], rtol=1e-5, atol=0)

    return Case(
        name=f"fisher_loss with gradient {name}, {'weighted' if weighted else 'no weight'}",
        check=check,
        ours=ours,
        peers=_steps(_peers(eager, compiled), output, grad=grad),
        moved_bytes=output.numel() * 4 * (4 if weighted else 3),  # one pass: all inputs, and the gradient of output
    )
