"""Dynamic rows: range, step, zero and codes in one call."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.quantize_rows import reference

SHAPES = {
    "MiniLM token x 384": (128, 384),
    "MiniLM ffn x 1536": (128, 1536),
    "llm decode": (1, 4096),
    "llm prefill": (512, 4096),
}


def cases(args):
    random = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=random).to(args.device)

        def check(x=x):
            for ours, theirs in zip(qk.ops.quantize_rows(x, 8), reference(x, 8), strict=True):
                assert torch.equal(ours, theirs)

        yield Case(
            name=f"quantize_rows {name}",
            check=check,
            ours=lambda x=x: qk.ops.quantize_rows(x, 8),
            peers={"eager torch": lambda x=x: reference(x, 8)},
            moved_bytes=x.numel() * 5,
        )


if __name__ == "__main__":
    main("quantize_rows", cases)
