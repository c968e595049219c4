"""conv2d by Winograd's algorithm against the direct kernel, 4-bit weights with 6- and 4-bit activations."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import at_peak, weight

import qk
from harness import Case, main, options
from qk.ops.conv2d import reference

SHAPES = {  # channels, size
    "resnet18 layer1.0.conv1": (64, 56),
    "resnet18 layer2.1.conv1": (128, 28),
    "resnet18 layer3.1.conv1": (256, 14),
    "resnet18 layer4.1.conv1": (512, 7),
}


def cases(args):
    torch.manual_seed(0)
    for name, (c, size) in SHAPES.items():
        codes, zero, step = weight(c, 9 * c, 4)
        packed, shape = qk.ops.pack(codes, 4), (c, 3, 3, c)
        direct = qk.ops.prepack(packed, zero, 4, shape)
        winograd = qk.ops.prepack(packed, zero, 4, shape, algorithm="winograd")
        bias, places = torch.randn(c), ((1, 1), (1, 1), (1, 1), 1)
        for x_bits in (6, 4):
            x = torch.randint(0, 2**x_bits, (args.batch, size, size, c), dtype=torch.uint8)
            inputs = (x, torch.tensor([0.02]), torch.tensor([0], dtype=torch.int32))
            out = {"out_step": torch.tensor([0.5]), "out_zero": torch.tensor([0], dtype=torch.int32)}
            out |= {"activation": "relu", "out_bits": x_bits}

            def run(weight, inputs=inputs, step=step, bias=bias, x_bits=x_bits, places=places, out=out):
                return qk.ops.conv2d(*inputs, weight, step, bias, 4, (3, 3), *places, x_bits, **out)

            def check(
                run=run,
                w=winograd,
                inputs=inputs,
                codes=codes,
                shape=shape,
                zero=zero,
                rest=(step, bias, *places),
                out=out,
            ):
                assert torch.equal(run(w), reference(*inputs, codes.reshape(shape), zero, *rest, **out))

            operations = 2 * args.batch * size * size * 9 * c * c
            yield Case(
                name=f"{name} 3x3/1 {c}->{c} @{size}, batch {args.batch}, W4A{x_bits}",
                check=check,
                ours=lambda run=run, w=winograd: run(w),
                peers={"direct": lambda run=run, w=direct: run(w)},
                limit=at_peak(operations),
                operations=operations,
            )


if __name__ == "__main__":
    parser = options("Times conv2d by Winograd's algorithm.")
    parser.add_argument("--batch", type=int, default=1)
    main("winograd", cases, parser)
