"""SPARQ values of which half are 0 to bytes at rest."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.sparq import FAMILIES
from qk.ops.sparq_pack import reference, row_bytes

SHAPE = (8 * 28 * 28, 128)  # resnet18 layer2, a row for each pixel


def cases(args):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-255, 256, SHAPE, generator=random).clamp(min=0).to(torch.uint8).to(args.device)
    for name, family in FAMILIES.items():
        cut = qk.ops.sparq(codes, *family)

        def check(cut=cut, family=family):
            assert torch.equal(qk.ops.sparq_pack(cut, *family), reference(cut, *family))

        yield Case(
            name=f"sparq_pack {name}",
            check=check,
            ours=lambda cut=cut, family=family: qk.ops.sparq_pack(cut, *family),
            peers={"eager torch": lambda cut=cut, family=family: reference(cut, *family)},
            moved_bytes=codes.numel() + SHAPE[0] * row_bytes(SHAPE[1], *family),
        )


if __name__ == "__main__":
    main("sparq_pack", cases)
