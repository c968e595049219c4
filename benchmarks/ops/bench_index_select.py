"""Channels of codes that some groups of a convolution read."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.index_select import reference

SHAPES = {
    "mobilenet-v2 features.2, batch 1, 80 of 96": ((1, 112, 112, 96), 80),
    "mobilenet-v2 features.8, batch 8, 60 of 384": ((8, 14, 14, 384), 60),
}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, (shape, count) in SHAPES.items():
        codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(args.device)
        index = torch.randperm(shape[-1], generator=random)[:count].int().to(args.device)

        def check(codes=codes, index=index):
            assert torch.equal(qk.ops.index_select(codes, index), reference(codes, index))

        yield Case(
            name=f"index_select, {name}",
            check=check,
            ours=lambda codes=codes, index=index: qk.ops.index_select(codes, index),
            peers={"torch.index_select": lambda codes=codes, index=index: torch.index_select(codes, -1, index)},
            moved_bytes=2 * count * codes.numel() // shape[-1],
        )


if __name__ == "__main__":
    main("index_select", cases)
