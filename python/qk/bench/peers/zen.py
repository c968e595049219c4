from __future__ import annotations
import torch
import zentorch  # noqa: F401
from .base import Peer
z = torch.ops.zentorch

def gemm(p, threads):
    d = p.data
    x = d.x  # prepacked int8 weights gave wrong results where K is not N
    run = lambda: z.zentorch_dynamic_qlinear(x, d.w_codes, d.w_step, d.bias)
    yield Peer("zentorch int8 dynamic", run, run)
    xs, xz, wz = torch.tensor([d.x_step]), torch.tensor([0], dtype=torch.int32), torch.zeros(p.n, dtype=torch.int32)
    run2 = lambda: z.zentorch_qlinear(d.x_codes, d.w_codes, xs, xz, d.w_step, wz, d.bias, None, None, torch.float32)
    yield Peer("zentorch int8 static", run2, run2)
    step = d.w.abs().amax(1, keepdim=True) / 7
    codes = (d.w / step).round().clamp(-8, 7).to(torch.int8)
    value = codes.float() * step
    packed = z.zentorch_woq_repack_weight(codes)
    xb, bb, s = x.bfloat16(), d.bias.bfloat16(), step.reshape(1, -1)
    run3 = lambda: z.zentorch_dynamic_qlinear(xb, packed, s, bb)
    yield Peer("zentorch W4A8", run3, lambda: run3().float() - x @ value.T - d.bias + d.y, "W4")
