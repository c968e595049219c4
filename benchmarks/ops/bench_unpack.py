"""Bytes at rest to codes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.unpack import reference

SHAPES = {"resnet18 layer4.1.conv2": (512, 4608), "odd columns": (512, 4607), "short rows": (65536, 27)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, (rows, cols) in SHAPES.items():
        for bits in (2, 4, 8):
            codes = torch.randint(0, 2**bits, (rows, cols), generator=random, dtype=torch.uint8).to(args.device)
            packed = qk.ops.pack(codes, bits)

            def check(packed=packed, bits=bits, cols=cols):
                assert torch.equal(qk.ops.unpack(packed, bits, cols), reference(packed, bits, cols))

            yield Case(
                name=f"unpack from {bits} bits, {name}",
                check=check,
                ours=lambda packed=packed, bits=bits, cols=cols: qk.ops.unpack(packed, bits, cols),
                peers={"eager torch": lambda packed=packed, bits=bits, cols=cols: reference(packed, bits, cols)},
                moved_bytes=codes.numel() * (8 + bits) // 8,
            )


if __name__ == "__main__":
    main("unpack", cases)
