from __future__ import annotations
import torch
from torch.nn import functional as F
from .base import Peer

def _engines():
    return [e for e in ("x86", "onednn", "fbgemm") if e in torch.backends.quantized.supported_engines]

def gemm(p, threads):
    d = p.data
    x, w = d.x, d.w
    yield Peer("torch float32", lambda: F.linear(x, w, d.bias), lambda: F.linear(x, w, d.bias), "f32")
    xb, wb, bb = x.bfloat16(), w.bfloat16(), d.bias.bfloat16()
    yield Peer("torch bfloat16", lambda: F.linear(xb, wb, bb), lambda: F.linear(xb, wb, bb).float(), "bf16")
    a, wt = (d.x_codes.int() - 128).to(torch.int8), d.w_codes.t()
    sums = d.w_codes.int().sum(1)
    def int_mm():
        return (torch._int_mm(a, wt) + 128 * sums).float() * (d.w_step * d.x_step) + d.bias
    yield Peer("torch._int_mm", lambda: torch._int_mm(a, wt), int_mm)
    qx = torch._make_per_tensor_quantized_tensor(d.x_codes, d.x_step, 0)
    qw = torch._make_per_channel_quantized_tensor(d.w_codes, d.w_step.double(), torch.zeros(p.n, dtype=torch.long), 0)
    for engine in _engines():
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(qw, d.bias)
        run = lambda e=packed: torch.ops.quantized.linear(qx, e, d.out_step, 0)
        yield Peer(f"torch int8 {engine}", run, lambda run=run: run().dequantize())
    torch.backends.quantized.engine = "x86"
    pw = torch.ops.onednn.qlinear_prepack(d.w_codes, [p.m, p.k])
    zero = torch.zeros(p.n, dtype=torch.int32)
    def run():
        return torch.ops.onednn.qlinear_pointwise(
            d.x_codes, d.x_step, 0, pw, d.w_step, zero, d.bias, 1.0, 0, torch.float32, "none", [], "")
    yield Peer("torch int8 onednn to f32", run, run)

def conv(p, threads):
    d = p.data
    x, w = d.x, d.w
    at = (p.stride, p.padding, 1, p.groups)
    run = lambda: F.conv2d(x, w, d.bias, *at)
    yield Peer("torch float32", run, run, "f32")
    xb, wb, bb = x.bfloat16(), w.bfloat16(), d.bias.bfloat16()
    yield Peer("torch bfloat16", lambda: F.conv2d(xb, wb, bb, *at), lambda: F.conv2d(xb, wb, bb, *at).float(), "bf16")
    qx = torch._make_per_tensor_quantized_tensor(d.x_codes.permute(0, 3, 1, 2), d.x_step, 0)
    qw = torch._make_per_channel_quantized_tensor(d.w_codes, d.w_step.double(), torch.zeros(p.outputs, dtype=torch.long), 0)
    for engine in _engines():
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.conv2d_prepack(qw, d.bias, [p.stride] * 2, [p.padding] * 2, [1, 1], p.groups)
        run = lambda e=packed: torch.ops.quantized.conv2d(qx, e, d.out_step, 0)
        yield Peer(f"torch int8 {engine}", run, lambda run=run: run().dequantize())
    torch.backends.quantized.engine = "x86"
