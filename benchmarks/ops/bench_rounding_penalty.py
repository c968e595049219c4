"""The rounding penalty: forward and backward against the definition in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, forward_backward, main
from qk.ops.rounding_penalty import reference

SHAPES = {"resnet18 layer4.1.conv2": (512, 512, 3, 3), "1M": (1024, 1024), "16M": (4096, 4096)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for beta in (15.5, 2.0):
        for name, shape in SHAPES.items():
            v = torch.randn(shape, generator=random).to(args.device).requires_grad_()
            grad = torch.tensor(0.01, device=args.device)

            def ours(v, beta=beta):
                return qk.ops.rounding_penalty(v, beta)

            def eager(v, beta=beta):
                return reference(v, beta)

            def check(v=v, grad=grad, ours=ours, eager=eager):
                torch.testing.assert_close(ours(v), eager(v), rtol=1e-4, atol=0)
                got, want = (torch.autograd.grad(f(v), v, grad)[0] for f in (ours, eager))
                assert ((got - want).abs() > 1e-5).sum() <= 1e-5 * v.numel()  # edges of the clamp

            peers = {"eager torch": eager} | ({"torch.compile": torch.compile(eager)} if args.compile else {})
            yield Case(
                name=f"rounding_penalty fwd+bwd {name}, beta {beta}",
                check=check,
                ours=forward_backward(ours, v, grad=grad),
                peers={name: forward_backward(f, v, grad=grad) for name, f in peers.items()},
                moved_bytes=v.numel() * 4 * 3,  # forward: v; backward: v, grad of v
            )


if __name__ == "__main__":
    main("rounding_penalty", cases)
