"""gemm_weight_only: float activations times weights of few bits, beside torch's float and its own packed int4.

The limit is reading the weight; with many rows the products themselves take longer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import weight

import qk
from harness import Case, main
from qk.deploy.pages import in_huge_pages
from qk.ops.gemm_weight_only import reference

LAYERS = {"cpu": (4096, 4096), "cuda": (8192, 8192)}  # K, N
ROWS = {"cpu": (1, 4, 16, 128), "cuda": (1, 16, 64, 256, 1024)}
TYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
WEIGHTS = ((4, 0), (4, 128), (2, 0), (8, 0))  # bits, length of a group of K


def int4pack(x, codes, group):
    """torch's own, with groups of as many; None where it has none for this."""
    try:
        if x.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            run = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(x.device)
            packed, run = torch.ops.aten._convert_weight_to_int4pack(pairs, 8), torch.ops.aten._weight_int4pack_mm
        numbers = torch.rand(codes.shape[1] // group, len(codes), 2, device=x.device, dtype=x.dtype)
        run(x, packed, group, numbers)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    return lambda: run(x, packed, group, numbers)


def cases(args):
    torch.manual_seed(0)
    k, n = LAYERS[args.device]
    for bits, group in WEIGHTS:
        codes, zero, step = weight(n, k, bits, k // group if group else 1)
        prepacked = in_huge_pages(
            qk.ops.prepack(qk.ops.pack(codes, bits).to(args.device), zero.to(args.device), bits, (n, k))
        )
        plain = (codes.to(args.device), zero.to(args.device), step.to(args.device))
        for dtype in TYPES[args.device]:
            w = torch.randn(n, k, device=args.device, dtype=dtype)
            for m in ROWS[args.device]:
                x = torch.randn(m, k, device=args.device).to(dtype)

                def ours(x=x, weight=prepacked, step=plain[2], bits=bits):
                    return qk.ops.gemm_weight_only(x, weight, step, None, bits)

                def check(ours=ours, x=x, plain=plain, dtype=dtype):
                    got, want = ours().double(), reference(x.double(), *plain)
                    # K roundings of the running sum, whose size is far below the sum of all sizes; then one of y.
                    error = torch.finfo(dtype).eps * want.abs() + 2**-20 * want.std() * len(plain[0]) ** 0.5
                    assert bool(((got - want).abs() <= error).all())

                name = str(dtype).removeprefix("torch.")
                peers = {f"torch {name}": lambda x=x, w=w: F.linear(x, w)}
                packed = int4pack(x, codes, group or 128) if bits == 4 and dtype == torch.bfloat16 else None
                if packed:
                    peers["torch int4pack, groups of 128"] = packed
                yield Case(
                    name=f"[{m}, {k}] x [{n}, {k}] {name}, W{bits}" + (f" groups of {group}" if group else ""),
                    check=check,
                    ours=ours,
                    peers=peers,
                    moved_bytes=prepacked.numel() + step.numel() * 4 + (m * k + m * n) * x.element_size(),
                    operations=2 * m * k * n,
                )


if __name__ == "__main__":
    main("gemm_weight_only", cases)
