"""Codes to bytes at rest."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.pack import reference

SHAPES = {"resnet18 layer4.1.conv2": (512, 4608), "odd columns": (512, 4607), "short rows": (65536, 27)}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, (rows, cols) in SHAPES.items():
        for bits in (2, 4, 8):
            codes = torch.randint(0, 2**bits, (rows, cols), generator=random, dtype=torch.uint8).to(args.device)

            def check(codes=codes, bits=bits):
                assert torch.equal(qk.ops.pack(codes, bits), reference(codes, bits))

            yield Case(
                name=f"pack to {bits} bits, {name}",
                check=check,
                ours=lambda codes=codes, bits=bits: qk.ops.pack(codes, bits),
                peers={"eager torch": lambda codes=codes, bits=bits: reference(codes, bits)},
                moved_bytes=codes.numel() * (8 + bits) // 8,
            )


if __name__ == "__main__":
    main("pack", cases)
