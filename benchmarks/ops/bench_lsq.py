"""LSQ: forward and backward against the same mathematics in torch and torch's own learnable fake-quantize."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, forward_backward, main
from qk.ops.lsq import reference, reference_backward

BITS = 4


def eager(x, step, zero):
    """Rounding and clamping under autograd with a straight-through round."""
    s = step.reshape(-1, *[1] * (x.dim() - 1)) if step.numel() > 1 else step
    low = -zero.reshape(s.shape).float()
    t = torch.minimum(torch.maximum(x / s, low), low + (2**BITS - 1))
    return (t + (t.round() - t).detach()) * s


def learnable(x, step, zero):
    top = 2**BITS - 1
    if step.numel() > 1:
        return torch._fake_quantize_learnable_per_channel_affine(x, step, zero.float(), 0, 0, top, 1.0)
    return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero.float(), 0, top, 1.0)


def cases(args):
    torch.manual_seed(0)
    for rows, cols, steps in [(1024, 1024, 1), (1024, 1024, 1024), (4096, 4096, 1), (4096, 4096, 4096)]:
        x = torch.randn(rows, cols, requires_grad=True)
        step = (0.2 + 0.2 * torch.rand(steps)).requires_grad_()
        zero = torch.full((steps,), 8, dtype=torch.int32)
        grad = torch.randn(rows, cols)

        def ours(x, step, zero):
            return qk.ops.lsq(x, step, zero, BITS)

        def check(x=x, step=step, zero=zero, grad=grad):
            assert torch.equal(ours(x, step, zero), reference(x, step, zero, BITS))
            got = torch.autograd.grad(ours(x, step, zero), (x, step), grad)
            want = reference_backward(grad, x, step, zero, BITS)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-2)  # a float sum of up to 16M terms

        peers = {"eager torch": eager, "torch learnable": learnable}
        if args.compile:
            peers["torch.compile"] = torch.compile(eager, dynamic=False)
        yield Case(
            name=f"lsq fwd+bwd {x.numel() >> 20}M, {'per tensor' if steps == 1 else 'per row'}",
            check=check,
            ours=forward_backward(ours, x, step, zero, grad=grad),
            peers={name: forward_backward(f, x, step, zero, grad=grad) for name, f in peers.items()},
            moved_bytes=x.numel() * 4 * 5,  # forward reads x, writes out; backward reads x and grad, writes grad of x
        )


if __name__ == "__main__":
    main("lsq", cases)
