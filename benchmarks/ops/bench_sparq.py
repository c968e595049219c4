"""SPARQ windows on codes of which half are 0, as after a ReLU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.sparq import reference

FAMILIES = {"5opt": (4, 1), "3opt": (4, 2), "2opt": (4, 4), "6opt": (3, 1), "7opt": (2, 1)}
SHAPE = (8, 28, 28, 128)  # resnet18 layer2, NHWC


def cases(args):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-255, 256, SHAPE, generator=random).clamp(min=0).to(torch.uint8).to(args.device)
    for name, family in FAMILIES.items():
        for round in (True, False):

            def check(family=family, round=round):
                assert torch.equal(qk.ops.sparq(codes, *family, round), reference(codes, *family, round))

            yield Case(
                name=f"sparq {name}, {'rounded' if round else 'cut off'}",
                check=check,
                ours=lambda family=family, round=round: qk.ops.sparq(codes, *family, round),
                peers={"eager torch": lambda family=family, round=round: reference(codes, *family, round)},
                moved_bytes=codes.numel() * 2,
            )


if __name__ == "__main__":
    main("sparq", cases)
