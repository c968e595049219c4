"""gemm: integer linear layers against torch's float32 and int8. The limit is the peak of products on one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import at_peak, weight

import qk
from harness import Case, main
from qk.ops.gemm import reference

SHAPES = {  # rows of x, K, N
    "minilm attention.query, 128 tokens": (128, 384, 384),
    "bert ffn.up, 128 tokens": (128, 768, 3072),
    "bert ffn.down, 512 tokens": (512, 3072, 768),
    "resnet50 layer4.0.conv3": (49, 512, 2048),
    "512 x 512, 128 rows": (128, 512, 512),
    "bert ffn.up, 16 tokens": (16, 768, 3072),
    "bert ffn.down, 16 tokens": (16, 3072, 768),
    "bert ffn.up, 128 tokens, codes": (128, 768, 3072),
    "bert ffn.up, 1 token": (1, 768, 3072),
    "llm prefill attention.output": (128, 4096, 4096),
    "llm, 16 sequences": (16, 4096, 4096),
    "llm decode attention.output": (1, 4096, 4096),
    "llm decode ffn.up": (1, 4096, 11008),
}


def cases(args):
    torch.manual_seed(0)
    for name, (m, k, n) in SHAPES.items():
        x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
        x_step, x_zero, bias = torch.tensor([0.02]), torch.tensor([7], dtype=torch.int32), torch.randn(n)
        x_float, w_float = torch.randn(m, k), torch.randn(n, k)
        x_int8, w_int8 = (x.int() - 128).to(torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
        epilogue = {"out_step": torch.tensor([100.0]), "out_zero": x_zero} if name.endswith("codes") else {}
        for bits, group in [(8, 0), (4, 0), (2, 0), (4, 32), (4, 64), (4, 128)]:
            codes, zero, step = weight(n, k, bits, k // group if group else 1)
            prepacked = qk.ops.prepack(qk.ops.pack(codes, bits), zero, bits, (n, k))

            def ours(p=prepacked, step=step, bits=bits, inputs=(x, x_step, x_zero), bias=bias, epilogue=epilogue):
                return qk.ops.gemm(*inputs, p, step, bias, bits, **epilogue)

            def check(ours=ours, weight=(codes, zero, step), inputs=(x, x_step, x_zero), bias=bias, epilogue=epilogue):
                assert torch.equal(ours(), reference(*inputs, *weight, bias, **epilogue))

            peers = {"torch float32": lambda x=x_float, w=w_float, b=bias: torch.nn.functional.linear(x, w, b)}
            if bits == 8:
                peers["torch._int_mm (int32 out)"] = lambda x=x_int8, w=w_int8: torch._int_mm(x, w.t())
            operations = 2 * m * k * n
            yield Case(
                name=f"{name} [{m}, {k}] x [{n}, {k}] W{bits}A8" + (f" groups of {group}" if group else ""),
                check=check,
                ours=ours,
                peers=peers,
                limit=at_peak(operations),
                operations=operations,
            )


if __name__ == "__main__":
    main("gemm", cases)
