"""The sum of a skip connection: codes in, codes out, sizes from one that L2 holds to one that it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.add import reference

SHAPES = {
    "resnet50 layer3, batch 1": (1, 14, 14, 1024),
    "resnet50 layer1, batch 1": (1, 56, 56, 256),
    "resnet50 layer1, batch 8": (8, 56, 56, 256),
}


def cases(args):
    random = torch.Generator().manual_seed(0)

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=args.device)

    steps = [(one(s), one(z, torch.int32)) for s, z in ((0.02, 128), (0.03, 0), (0.04, 5))]
    for name, shape in SHAPES.items():
        a, b = (torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(args.device) for _ in range(2))
        call = (a, *steps[0], b, *steps[1], "relu", *steps[2])

        def check(call=call):
            assert torch.equal(qk.ops.add(*call), reference(*call))

        peers = {"eager torch": lambda call=call: reference(*call)}
        if args.device == "cpu":
            qa, qb = (
                torch._make_per_tensor_quantized_tensor(x, s.item(), z.item())
                for x, (s, z) in zip((a, b), steps[:2], strict=True)
            )
            peers["torch.ops.quantized.add_relu"] = lambda qa=qa, qb=qb: torch.ops.quantized.add_relu(qa, qb, 0.04, 5)
        yield Case(
            name=f"add, {name}",
            check=check,
            ours=lambda call=call: qk.ops.add(*call),
            peers=peers,
            moved_bytes=3 * a.numel(),
        )


if __name__ == "__main__":
    main("add", cases)
