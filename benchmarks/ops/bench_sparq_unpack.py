"""SPARQ values at rest, of which half are 0, to codes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.sparq import FAMILIES
from qk.ops.sparq_unpack import reference

SHAPE = (8 * 28 * 28, 128)  # resnet18 layer2, a row for each pixel


def cases(args):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-255, 256, SHAPE, generator=random).clamp(min=0).to(torch.uint8).to(args.device)
    for name, family in FAMILIES.items():
        packed = qk.ops.sparq_pack(qk.ops.sparq(codes, *family), *family)

        def check(packed=packed, family=family):
            assert torch.equal(qk.ops.sparq_unpack(packed, SHAPE[1], *family), reference(packed, SHAPE[1], *family))

        yield Case(
            name=f"sparq_unpack {name}",
            check=check,
            ours=lambda packed=packed, family=family: qk.ops.sparq_unpack(packed, SHAPE[1], *family),
            peers={"eager torch": lambda packed=packed, family=family: reference(packed, SHAPE[1], *family)},
            moved_bytes=codes.numel() + packed.numel(),
        )


if __name__ == "__main__":
    main("sparq_unpack", cases)
