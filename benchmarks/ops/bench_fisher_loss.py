"""The weighted reconstruction loss: forward and backward against the definition in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, forward_backward, main
from qk.ops.fisher_loss import reference

SHAPES = {"resnet18 layer1, batch 32 of 224x224": (32, 64, 56, 56), "1M": (1024, 1024), "16M": (4096, 4096)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for weighted in (True, False):
        for name, shape in SHAPES.items():
            output, target, g = (torch.randn(shape, generator=random).to(args.device) for _ in range(3))
            weight = g.square() if weighted else None
            scale = shape[1] / output.numel()
            grad = torch.ones((), device=args.device)
            output.requires_grad_()

            def ours(output, target=target, weight=weight, scale=scale):
                return qk.ops.fisher_loss(output, target, weight, scale)

            def eager(output, target=target, weight=weight, scale=scale):
                return reference(output, target, weight, scale)

            def check(output=output, grad=grad, ours=ours, eager=eager):
                got, want = (torch.autograd.grad(f(output), output, grad)[0] for f in (ours, eager))
                torch.testing.assert_close(ours(output), eager(output), rtol=1e-4, atol=0)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=0)

            peers = {"eager torch": eager} | ({"torch.compile": torch.compile(eager)} if args.compile else {})
            read = 3 if weighted else 2
            yield Case(
                name=f"fisher_loss fwd+bwd {name}, {'weighted' if weighted else 'no weight'}",
                check=check,
                ours=forward_backward(ours, output, grad=grad),
                peers={name: forward_backward(f, output, grad=grad) for name, f in peers.items()},
                moved_bytes=output.numel() * 4 * (2 * read + 1),  # both passes read everything; gradient of output
            )


if __name__ == "__main__":
    main("fisher_loss", cases)
