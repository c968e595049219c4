"""Codes to float, one step and one for each channel."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.dequantize import reference

SHAPES = {"resnet18 layer4.1.conv2": (512, 4608), "4M": (1024, 4096)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, (rows, cols) in SHAPES.items():
        codes = torch.randint(0, 256, (rows, cols), generator=random, dtype=torch.uint8).to(args.device)
        for steps in (1, rows):
            step = (0.1 + torch.rand(steps, generator=random)).to(args.device)
            zero = torch.full((steps,), 128, dtype=torch.int32, device=args.device)
            tensors = (codes, step, zero)

            def check(tensors=tensors):
                assert torch.equal(qk.ops.dequantize(*tensors), reference(*tensors))

            yield Case(
                name=f"dequantize {name}, {steps} steps",
                check=check,
                ours=lambda tensors=tensors: qk.ops.dequantize(*tensors),
                peers={"eager torch": lambda tensors=tensors: reference(*tensors)},
                moved_bytes=codes.numel() * 5,
            )


if __name__ == "__main__":
    main("dequantize", cases)
