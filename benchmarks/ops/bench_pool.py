"""The pools of vision models over NHWC codes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.pool import reference

#           x, mode, kernel, stride, padding
CASES = {
    "resnet stem": ((1, 112, 112, 64), "max", (3, 3), (2, 2), (1, 1)),
    "vgg first": ((1, 224, 224, 64), "max", (2, 2), (2, 2), (0, 0)),
    "vgg third": ((1, 56, 56, 256), "max", (2, 2), (2, 2), (0, 0)),
    "resnet18 last": ((1, 7, 7, 512), "average", (7, 7), (7, 7), (0, 0)),
    "resnet50 last": ((1, 7, 7, 2048), "average", (7, 7), (7, 7), (0, 0)),
    "squeeze of efficientnet-b0 block 2": ((1, 56, 56, 96), "average", (56, 56), (56, 56), (0, 0)),
    "inception 3 x 3": ((1, 35, 35, 192), "average", (3, 3), (1, 1), (1, 1)),
}


def cases(args):
    random = torch.Generator().manual_seed(0)
    step, zero = torch.tensor([0.02], device=args.device), torch.tensor([5], dtype=torch.int32, device=args.device)
    for name, (shape, mode, *window) in CASES.items():
        x = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(args.device)
        out = {} if mode == "max" else {"out_step": step, "out_zero": zero}

        def check(x=x, mode=mode, window=window, out=out):
            assert torch.equal(
                qk.ops.pool(x, step, zero, mode, *window, **out), reference(x, step, zero, mode, *window, **out)
            )

        peers = {}
        if args.device == "cpu":
            quantized = torch._make_per_tensor_quantized_tensor(x, 0.02, 5).permute(0, 3, 1, 2)
            if mode == "max":
                peers["quantized max_pool2d"] = lambda q=quantized, w=window: F.max_pool2d(q, *w)
            elif window[0] == shape[1:3]:
                peers["quantized adaptive_avg_pool2d"] = lambda q=quantized: F.adaptive_avg_pool2d(q, 1)
            else:
                peers["quantized avg_pool2d"] = lambda q=quantized, w=window: F.avg_pool2d(q, *w)
        floats = x.float().permute(0, 3, 1, 2)
        run = F.max_pool2d if mode == "max" else F.avg_pool2d
        peers["float32, channels last"] = lambda f=floats, w=window, run=run: run(f, *w)
        pooled = qk.ops.pool(x, step, zero, mode, *window, **out)
        yield Case(
            name=f"pool {mode}, {name}",
            check=check,
            ours=lambda x=x, mode=mode, window=window, out=out: qk.ops.pool(x, step, zero, mode, *window, **out),
            peers=peers,
            moved_bytes=x.numel() + pooled.numel(),
        )


if __name__ == "__main__":
    main("pool", cases)
