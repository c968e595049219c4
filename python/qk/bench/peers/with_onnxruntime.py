"""ONNX Runtime: QLinearMatMul and QLinearConv (u8 x s8), MatMulNBits, and networks in QDQ form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # a peer without it builds nothing
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qk.bench.problems import Conv, Gemm
from qk.bench.rows import Candidate, meets

PACKAGES = ("onnxruntime", "onnx")
INT8_ERROR = 0.1
DYNAMIC_ERROR = 0.1  # activations rounded to 8 bits inside
BLOCK = 128  # weights that share a step; with 32 it was slower at every shape
TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}

ort.set_default_logger_severity(3)


def _session(model: onnx.ModelProto | Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _bound(node: Any, x: Tensor, out: tuple[int, list[int]], consts: dict[str, Any], threads: int) -> Any:
    """A run of one operator on memory that is bound once, and what gives its result."""
    kind = {torch.uint8: TensorProto.UINT8, torch.float32: TensorProto.FLOAT}[x.dtype]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", *out)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in consts.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    session = _session(model, threads)
    binding = session.io_binding()
    given = ort.OrtValue.ortvalue_from_numpy(x.numpy())
    taken = ort.OrtValue.ortvalue_from_shape_and_type(out[1], TYPES[session.get_outputs()[0].type])
    binding.bind_ortvalue_input("x", given)
    binding.bind_ortvalue_output("y", taken)
    keep = (given, taken)

    def run(keep: Any = keep) -> None:
        session.run_with_iobinding(binding)

    def result() -> Tensor:
        run()
        return torch.from_numpy(taken.numpy().copy())

    return run, result


def gemm(p: Gemm, threads: int) -> Iterable[Candidate]:
    d = p.data
    scales = {"xs": np.float32(d.x_step), "xz": np.uint8(0), "ws": d.w_step.numpy(), "wz": np.zeros(p.n, np.int8)}
    consts = scales | {"w": d.w_codes.t().numpy(), "ys": np.float32(d.out_step), "yz": np.uint8(0)}
    node = helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
    run, result = _bound(node, d.x_codes, (TensorProto.UINT8, [p.m, p.n]), consts, threads)

    def check(result: Callable[[], Tensor] = result) -> None:
        meets(result() * d.out_step, (d.y - d.bias).clamp(0, 255 * d.out_step), INT8_ERROR)  # the operator has no bias

    yield Candidate("ORT int8", "W8", run, check)
    if p.k % BLOCK == 0:
        for bits in (4, 2):
            yield _nbits(p, bits, BLOCK, threads)


def _nbits(p: Gemm, bits: int, block: int, threads: int) -> Candidate:
    d = p.data
    codes, step, expected = d.blocks(bits, block)
    parts = (codes + 2 ** (bits - 1)).to(torch.uint8).reshape(p.n, p.k // block, -1, 8 // bits)
    packed = sum(parts[..., i] << (bits * i) for i in range(8 // bits))
    at = {"K": p.k, "N": p.n, "bits": bits, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **at)
    consts = {"w": packed.to(torch.uint8).numpy(), "s": step.reshape(p.n, -1).numpy()}
    run, result = _bound(node, d.x, (TensorProto.FLOAT, [p.m, p.n]), consts, threads)

    def check() -> None:
        meets(result(), expected, DYNAMIC_ERROR)

    return Candidate(f"ORT MatMulNBits W{bits} g{block}", f"W{bits}", run, check)


def conv(p: Conv, threads: int) -> Iterable[Candidate]:
    d = p.data
    scales = {"xs": np.float32(d.x_step), "xz": np.uint8(0), "ws": d.w_step.numpy(), "wz": np.zeros(p.outputs, np.int8)}
    consts = scales | {
        "w": d.w_codes.contiguous().numpy(),
        "ys": np.float32(d.out_step),
        "yz": np.uint8(0),
        "b": (d.bias / (d.w_step * d.x_step)).round().int().numpy(),
    }
    at = {"kernel_shape": [p.kernel] * 2, "strides": [p.stride] * 2, "pads": [p.padding] * 4, "group": p.groups}
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    node = helper.make_node("QLinearConv", inputs, ["y"], domain="com.microsoft", channels_last=1, **at)
    shape = [p.batch, p.out_size, p.out_size, p.outputs]
    run, result = _bound(node, d.x_codes, (TensorProto.UINT8, shape), consts, threads)

    def check() -> None:
        got = result().permute(0, 3, 1, 2) * d.out_step
        meets(got, d.y.clamp(0, 255 * d.out_step), INT8_ERROR)

    yield Candidate("ORT int8", "W8", run, check)


def network(net: Any, threads: int, cache: Path) -> Iterable[Candidate]:
    quantized, floating = _files(net, cache)
    feeds = [t.numpy() for t in net.inputs]
    for path, family, tolerance in ((quantized, "int8", net.int8_error), (floating, "float32", 1e-2)):
        session = _session(path, threads)
        feed = {i.name: value for i, value in zip(session.get_inputs(), feeds, strict=True)}
        run = partial(session.run, None, feed)

        def check(run: Any = run, tolerance: float = tolerance) -> None:
            net.close(torch.from_numpy(run()[0]), tolerance)

        yield Candidate(f"ORT {family}", family, run, check)


def _files(net: Any, cache: Path) -> tuple[Path, Path]:
    """The network as int8 (convolutions in QDQ form, transformers dynamic) and as float32, made once."""
    from onnxruntime import quantization

    stem = f"{net.key}-ort{ort.__version__}"
    quantized, floating = cache / f"{stem}.int8.onnx", cache / f"{stem}.onnx"
    if not quantized.exists():
        cache.mkdir(parents=True, exist_ok=True)
        named = {"input_names": [f"x{i}" for i in range(len(net.inputs))], "external_data": False, "verbose": False}
        torch.onnx.export(net.model, net.inputs, str(floating), dynamo=True, **named)
        part = quantized.with_suffix(".part")
        if net.is_transformer:
            quantization.quantize_dynamic(
                str(floating), str(part), per_channel=True, weight_type=quantization.QuantType.QInt8
            )
        else:
            prepared = cache / f"{stem}.prepared.onnx"
            quantization.shape_inference.quant_pre_process(str(floating), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(part),
                _Calibration({"x0": net.inputs[0].numpy()}),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            prepared.unlink()
        part.rename(quantized)
    return quantized, floating


class _Calibration:
    """One batch, as ONNX Runtime asks for it."""

    def __init__(self, feed: dict[str, Any]):
        self.left = [feed]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None
