"""Channels of several points put into a layer's result: a tenth of the channels, two terms each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.index_put import reference

SHAPES = {
    "resnet18 layer1, batch 1": (1, 56, 56, 64),
    "resnet18 layer4, batch 8": (8, 7, 7, 512),
    "mobilenet-v2 features.2, batch 1": (1, 112, 112, 96),
}


def cases(args):
    random = torch.Generator().manual_seed(0)
    step, zero = torch.tensor([0.02]).to(args.device), torch.tensor([128], dtype=torch.int32).to(args.device)
    for name, shape in SHAPES.items():
        count = shape[-1] // 10
        x = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        added = torch.randn((*shape[:-1], 2 * count), generator=random)
        index = torch.randperm(shape[-1], generator=random)[:count].int()
        source = torch.arange(2 * count, dtype=torch.int32).reshape(2, count)
        given = [t.to(args.device) for t in (x, added, index, source)]
        call = (*given, None, None, None, "relu", step, zero)

        def check(call=call):
            assert torch.equal(qk.ops.index_put(*call), reference(*call))

        columns = given[2].long()

        def eager(x=given[0], added=given[1], index=columns, count=count):
            y = torch.relu(added[..., :count] + added[..., count:])
            return x.index_copy(-1, index, qk.ops.quantize(y, step, zero, 8))

        yield Case(
            name=f"index_put, {name}",
            check=check,
            ours=lambda call=call: qk.ops.index_put(*call),
            peers={"eager torch and qk.quantize": eager},
            moved_bytes=2 * x.numel() + 4 * added.numel(),
        )


if __name__ == "__main__":
    main("index_put", cases)
