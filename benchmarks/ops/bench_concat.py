"""Channels side by side: all of the result's step, or each of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.concat import reference

SHAPES = {
    "googlenet inception3a": ((1, 28, 28), (64, 128, 32, 32)),
    "densenet121 block 3": ((1, 14, 14), (512, 32)),
    "googlenet inception3a, batch 8": ((8, 28, 28), (64, 128, 32, 32)),
}


def cases(args):
    random = torch.Generator().manual_seed(0)

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=args.device)

    for name, (image, channels) in SHAPES.items():
        codes = [
            torch.randint(0, 256, (*image, c), generator=random, dtype=torch.uint8).to(args.device) for c in channels
        ]
        for kind in ("one step", "steps of their own"):
            steps = [0.04 if kind == "one step" else 0.01 * (i + 1) for i in range(len(codes))]
            call = (
                codes,
                [one(s) for s in steps],
                [one(5, torch.int32) for _ in codes],
                one(0.04),
                one(5, torch.int32),
            )

            def check(call=call):
                assert torch.equal(qk.ops.concat(*call), reference(*call))

            peers = {"eager torch": lambda call=call: reference(*call)}
            if kind == "one step":
                peers["torch.cat"] = lambda codes=codes: torch.cat(codes, -1)
            if args.device == "cpu":
                quantized = [
                    torch._make_per_tensor_quantized_tensor(c, s, 5).permute(0, 3, 1, 2)
                    for c, s in zip(codes, steps, strict=True)
                ]
                peers["torch.ops.quantized.cat"] = lambda q=quantized: torch.ops.quantized.cat(q, 1, 0.04, 5)
            yield Case(
                name=f"concat of {kind}, {name}",
                check=check,
                ours=lambda call=call: qk.ops.concat(*call),
                peers=peers,
                moved_bytes=2 * sum(c.numel() for c in codes),
            )


if __name__ == "__main__":
    main("concat", cases)
