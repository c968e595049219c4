from __future__ import annotations
import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from openvino import Type, Layout
from openvino.preprocess import PrePostProcessor
from .base import Peer

core = ov.Core()

def compile(model, threads, **more):
    return core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32", **more})

def bound(compiled, feed):
    r = compiled.create_infer_request()
    t = ov.Tensor(feed, shared_memory=True)
    r.set_input_tensor(t)
    def run(r=r, t=t, feed=feed):
        r.infer()
    return run, lambda: torch.from_numpy(r.get_output_tensor().data.copy())

def _codes(y, step):
    z, top = np.float32(0), np.float32(255)
    return op.convert(op.fake_quantize(y, z, np.float32(255 * step), z, top, 256), Type.u8)

def _values(x, step):
    """Codes to values; the second, idle quantization is what makes its passes keep integers."""
    v, z, top = op.multiply(op.convert(x, Type.f32), np.float32(step)), np.float32(0), np.float32(255 * step)
    return op.fake_quantize(v, z, top, z, top, 256)

def _weights(codes, step):
    c = op.convert(op.constant(codes.numpy(), Type.i8), Type.f32)
    return op.multiply(c, op.constant(step.reshape(-1, *[1] * (codes.dim() - 1)).numpy()))

def gemm(p, threads):
    d = p.data
    for out in ("f32", "u8"):
        x = op.parameter([p.m, p.k], Type.u8, name="x")
        v = _values(x, d.x_step)
        y = op.add(op.matmul(v, _weights(d.w_codes, d.w_step), False, True), op.constant(d.bias.reshape(1, -1).numpy()))
        if out == "u8":
            y = _codes(y, d.out_step)
        run, get = bound(compile(ov.Model([y], [x], "g"), threads), d.x_codes.numpy())
        def result(run=run, get=get, out=out):
            run()
            return get().float() * (d.out_step if out == "u8" else 1)
        yield Peer(f"OpenVINO int8 to {out}", run, result)
    for group, dyn in [(128, 128), (128, 32), (128, 0)]:
        w = d.w.reshape(p.n, p.k // group, group)
        step = w.abs().amax(2, keepdim=True) / 7
        codes = (w / step).round().clamp(-8, 7).to(torch.int8)
        value = (codes.float() * step).reshape(p.n, p.k)
        c = codes.numpy().reshape(-1) & 15
        packed = (c[0::2] | (c[1::2] << 4)).astype(np.uint8)
        const = op.constant(ov.Tensor(packed, list(codes.shape), Type.i4))
        x = op.parameter([p.m, p.k], Type.f32, name="x")
        wv = op.reshape(op.multiply(op.convert(const, Type.f32), op.constant(step.numpy())), np.array([p.n, p.k]), False)
        y = op.matmul(x, wv, False, True)
        run, get = bound(compile(ov.Model([y], [x], "g"), threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=dyn), d.x.numpy())
        def result(run=run, get=get, value=value):
            run()
            return get() - d.x @ value.T + d.y
        yield Peer(f"OpenVINO W4 g128 dyn{dyn}", run, result, "W4")

def conv(p, threads):
    d = p.data
    for out in ("f32", "u8"):
        x = op.parameter([p.batch, p.channels, p.size, p.size], Type.u8, name="x")
        v = _values(x, d.x_step)
        at = ([p.stride] * 2, [p.padding] * 2, [p.padding] * 2, [1, 1])
        if p.groups > 1:
            w = d.w_codes.reshape(p.groups, p.outputs // p.groups, *d.w_codes.shape[1:])
            c = op.convert(op.constant(w.numpy(), Type.i8), Type.f32)
            w = op.multiply(c, op.constant(d.w_step.reshape(p.groups, -1, 1, 1, 1).numpy()))
            y = op.group_convolution(v, w, *at)
        else:
            y = op.convolution(v, _weights(d.w_codes.contiguous(), d.w_step), *at)
        y = op.add(y, op.constant(d.bias.reshape(1, -1, 1, 1).numpy()))
        if out == "u8":
            y = _codes(y, d.out_step)
        ppp = PrePostProcessor(ov.Model([y], [x], "g"))
        ppp.input().tensor().set_layout(Layout("NHWC"))
        ppp.input().model().set_layout(Layout("NCHW"))
        ppp.output().tensor().set_layout(Layout("NHWC"))
        ppp.output().model().set_layout(Layout("NCHW"))
        run, get = bound(compile(ppp.build(), threads), d.x_codes.numpy())
        def result(run=run, get=get, out=out):
            run()
            return get().float().permute(0, 3, 1, 2) * (d.out_step if out == "u8" else 1)
        yield Peer(f"OpenVINO int8 to {out}", run, result)
