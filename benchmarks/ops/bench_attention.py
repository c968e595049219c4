"""Attention on codes, against that of torch on values. The limit is the peak of products on one thread of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import at_peak

import qk
from harness import Case, main
from qk.ops.attention import reference

SHAPES = {  # batch, tokens, heads, values of a head
    "minilm, 128 tokens, batch 1": (1, 128, 12, 32),
    "minilm, 128 tokens, batch 8": (8, 128, 12, 32),
    "vit-b/16, 197 tokens, batch 1": (1, 197, 12, 64),
    "bert-base, 512 tokens, batch 1": (1, 512, 12, 64),
}


def cases(args):
    random = torch.Generator().manual_seed(0)

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=args.device)

    def scale(step, zero):
        return one(step), one(zero, torch.int32)

    for name, (batch, tokens, heads, depth) in SHAPES.items():
        # Values of about normal size, whose scores need a softmax.
        sides = [
            ((40 * torch.randn(batch, tokens, heads * depth, generator=random)).round() + 128).clamp(0, 255)
            for _ in range(3)
        ]
        codes = [u.to(torch.uint8).to(args.device) for u in sides]
        given = scale(1 / 40, 128)
        call = [t for u in codes for t in (u, *given)] + [heads, None, None, *scale(0.004, 128)]

        def check(call=call):
            assert torch.equal(qk.ops.attention(*call), reference(*call))

        peers = {"eager torch": lambda call=call: reference(*call)}
        for dtype in (torch.float32, torch.bfloat16):
            values = [((u.float() - 128) / 40).to(dtype).unflatten(-1, (heads, depth)).transpose(1, 2) for u in codes]
            word = str(dtype).removeprefix("torch.")
            peers[f"torch sdpa {word}"] = lambda values=values: F.scaled_dot_product_attention(*values)
        operations = 4 * batch * heads * tokens**2 * depth
        yield Case(
            name=f"attention, {name}",
            check=check,
            ours=lambda call=call: qk.ops.attention(*call),
            peers=peers,
            moved_bytes=4 * codes[0].numel(),
            limit=at_peak(operations) if args.device == "cpu" else None,
            operations=operations,
        )


if __name__ == "__main__":
    main("attention", cases)
