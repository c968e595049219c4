"""Images times the gates of a squeeze-and-excitation block."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.multiply import reference

SHAPES = {
    "efficientnet-b0 block 2, batch 1": (1, 56, 56, 96),
    "mobilenet-v3 block 4, batch 1": (1, 28, 28, 72),
    "efficientnet-b0 block 12, batch 8": (8, 14, 14, 672),
}


def cases(args):
    random = torch.Generator().manual_seed(0)

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=args.device)

    steps = [(one(s), one(z, torch.int32)) for s, z in ((0.02, 128), (1 / 255, 0), (0.018, 130))]
    for name, shape in SHAPES.items():
        x = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(args.device)
        gate = torch.randint(0, 256, (shape[0], 1, 1, shape[3]), generator=random, dtype=torch.uint8).to(args.device)
        call = (x, *steps[0], gate, *steps[1], "none", *steps[2])

        def check(call=call):
            assert torch.equal(qk.ops.multiply(*call), reference(*call))

        peers = {"eager torch": lambda call=call: reference(*call)}
        if args.device == "cpu":
            qx, qg = (
                torch._make_per_tensor_quantized_tensor(t, s.item(), z.item()).permute(0, 3, 1, 2)
                for t, (s, z) in zip((x, gate), steps[:2], strict=True)
            )
            peers["torch.ops.quantized.mul"] = lambda qx=qx, qg=qg: torch.ops.quantized.mul(qx, qg, 0.018, 130)
        yield Case(
            name=f"multiply, {name}",
            check=check,
            ours=lambda call=call: qk.ops.multiply(*call),
            peers=peers,
            moved_bytes=2 * x.numel(),
        )


if __name__ == "__main__":
    main("multiply", cases)
