"""Codes through a table of 256 entries."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.lookup import reference

SHAPES = {"L2 holds it": (1, 56, 56, 128), "L2 does not": (8, 112, 112, 64)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for dtype, size in ((torch.uint8, 1), (torch.float32, 4)):
        table = torch.randint(0, 256, (256,), generator=random).to(dtype).to(args.device)
        for name, shape in SHAPES.items():
            codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(args.device)

            def check(codes=codes, table=table):
                assert torch.equal(qk.ops.lookup(codes, table), reference(codes, table))

            yield Case(
                name=f"lookup to {str(dtype).removeprefix('torch.')}, {name}",
                check=check,
                ours=lambda codes=codes, table=table: qk.ops.lookup(codes, table),
                peers={"eager torch": lambda codes=codes, table=table: reference(codes, table)},
                moved_bytes=codes.numel() * (1 + size),
            )


if __name__ == "__main__":
    main("lookup", cases)
