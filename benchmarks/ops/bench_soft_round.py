"""Soft rounding: forward and backward against the definition in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, forward_backward, main
from qk.ops.soft_round import reference

BITS = 4
SHAPES = {"resnet18 layer4.1.conv2": (512, 512, 3, 3), "1M": (1024, 1024), "16M": (4096, 4096)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        weight, v, grad = (torch.randn(shape, generator=random).to(args.device) for _ in range(3))
        step = (0.2 + 0.2 * torch.rand(shape[0], generator=random)).to(args.device)
        zero = torch.full((shape[0],), 8, dtype=torch.int32, device=args.device)
        v.requires_grad_()

        def ours(v, weight=weight, step=step, zero=zero):
            return qk.ops.soft_round(weight, v, step, zero, BITS)

        def eager(v, weight=weight, step=step, zero=zero):
            return reference(weight, v, step, zero, BITS)

        def check(v=v, grad=grad, ours=ours, eager=eager):
            torch.testing.assert_close(ours(v), eager(v), rtol=0, atol=1e-5)
            got, want = (torch.autograd.grad(f(v), v, grad)[0] for f in (ours, eager))
            assert ((got - want).abs() > 1e-5).sum() <= 1e-5 * v.numel()  # edges of the clamps

        peers = {"eager torch": eager} | ({"torch.compile": torch.compile(eager)} if args.compile else {})
        yield Case(
            name=f"soft_round fwd+bwd {name}",
            check=check,
            ours=forward_backward(ours, v, grad=grad),
            peers={name: forward_backward(f, v, grad=grad) for name, f in peers.items()},
            moved_bytes=v.numel() * 4 * 7,  # forward: weight, v, out; backward: grad, weight, v, grad of v
        )


if __name__ == "__main__":
    main("soft_round", cases)
