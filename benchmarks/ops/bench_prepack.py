"""prepack: what loading a model costs, against a copy that moves as many bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import weight

import qk
from harness import Case, main
from qk.ops.gemm import reference

SHAPES = {"bert ffn.up": (3072, 768), "llm attention.output": (4096, 4096)}  # N, K


def cases(args):
    torch.manual_seed(0)
    for name, (n, k) in SHAPES.items():
        for bits in (8, 4, 2):
            codes, zero, step = weight(n, k, bits)
            packed = qk.ops.pack(codes, bits)

            def ours(packed=packed, zero=zero, bits=bits, shape=(n, k)):
                return qk.ops.prepack(packed, zero, bits, shape)

            def check(ours=ours, codes=codes, zero=zero, step=step, bits=bits, k=k):
                x, one = torch.randint(0, 256, (3, k), dtype=torch.uint8), torch.ones(1)
                none = torch.zeros(1, dtype=torch.int32)
                want = reference(x, one, none, codes, zero, step)
                assert torch.equal(qk.ops.gemm(x, one, none, ours(), step, None, bits), want)

            yield Case(
                name=f"{name} [{n}, {k}] W{bits}",
                check=check,
                ours=ours,
                moved_bytes=packed.numel() + ours().numel(),
            )


if __name__ == "__main__":
    main("prepack", cases)
