"""Float to codes: dense, and an NCHW tensor seen as NHWC against copying it first."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.quantize import reference

SHAPES = {
    "resnet18 layer1 input, batch 1": (1, 64, 56, 56),
    "resnet50 layer4 input": (8, 1024, 14, 14),
    "image": (8, 3, 224, 224),
}


def cases(args):
    random = torch.Generator().manual_seed(0)
    step = torch.tensor([0.02], device=args.device)
    zero = torch.tensor([128], dtype=torch.int32, device=args.device)
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=random).to(args.device)
        for lies, seen in (("dense", x), ("NCHW as NHWC", x.permute(0, 2, 3, 1))):

            def check(seen=seen):
                assert torch.equal(qk.ops.quantize(seen, step, zero, 8), reference(seen, step, zero, 8))

            peers = {
                "eager torch": lambda seen=seen: reference(seen, step, zero, 8),
                "torch.quantize_per_tensor": lambda seen=seen: torch.quantize_per_tensor(
                    seen.contiguous(), 0.02, 128, torch.quint8
                ),
            }
            if lies != "dense":
                peers["contiguous, then ours"] = lambda seen=seen: qk.ops.quantize(seen.contiguous(), step, zero, 8)
            yield Case(
                name=f"quantize {lies}, {name}",
                check=check,
                ours=lambda seen=seen: qk.ops.quantize(seen, step, zero, 8),
                peers=peers,
                moved_bytes=x.numel() * 5,
            )


if __name__ == "__main__":
    main("quantize", cases)
