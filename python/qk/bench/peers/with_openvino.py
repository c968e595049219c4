"""OpenVINO: int8 by its own low-precision passes, 4-bit weights with dynamic quantization, networks by NNCF."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import Layout, Type
from openvino import opset13 as op
from openvino.preprocess import PrePostProcessor
from torch import Tensor

from qk.bench.problems import Conv, Gemm
from qk.bench.rows import Candidate, meets

PACKAGES = ("openvino", "nncf")
INT8_ERROR = 0.1
DYNAMIC_ERROR = 0.1
core = ov.Core()


def _compiled(model: Any, threads: int, precision: str = "f32", **more: Any) -> Any:
    """precision: of what stays in float. With AMX the default is bf16, which dynamic quantization does not take."""
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    return core.compile_model(model, "CPU", options | {"INFERENCE_PRECISION_HINT": precision} | more)


def _bound(compiled: Any, *inputs: Tensor) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A run on memory that is bound once, and what gives its result."""
    request = compiled.create_infer_request()
    given = [ov.Tensor(t.numpy(), shared_memory=True) for t in inputs]
    for i, tensor in enumerate(given):
        request.set_input_tensor(i, tensor)

    def run(keep: Any = (inputs, given)) -> None:
        request.infer()

    def result() -> Tensor:
        run()
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return run, result


def _values(x: Any, step: float) -> Any:
    """Codes to values; the second, idle quantization is what makes the passes keep integers."""
    value, zero, top = op.multiply(op.convert(x, Type.f32), np.float32(step)), np.float32(0), np.float32(255 * step)
    return op.fake_quantize(value, zero, top, zero, top, 256)


def _weights(codes: Tensor, step: Tensor) -> Any:
    value = op.convert(op.constant(codes.contiguous().numpy(), Type.i8), Type.f32)
    return op.multiply(value, op.constant(step.numpy()))


def _codes(y: Any, step: float) -> Any:
    zero = np.float32(0)
    return op.convert(op.fake_quantize(y, zero, np.float32(255 * step), zero, np.float32(255), 256), Type.u8)


def gemm(p: Gemm, threads: int) -> Iterable[Candidate]:
    d = p.data
    for out in ("float32", "codes"):
        x = op.parameter([p.m, p.k], Type.u8)
        product = op.matmul(_values(x, d.x_step), _weights(d.w_codes, d.w_step[:, None]), False, True)
        y = op.add(product, op.constant(d.bias[None].numpy()))
        model = ov.Model([_codes(y, d.out_step) if out == "codes" else y], [x], "gemm")
        yield _int8(_bound(_compiled(model, threads), d.x_codes), out, d)
    for dynamic in (128, 32):
        if p.k % 128 == 0:
            yield _w4(p, 128, dynamic, threads)


def _int8(bound: Any, out: str, d: Any, nhwc: bool = False) -> Candidate:
    run, result = bound

    def check() -> None:
        got = result().permute(0, 3, 1, 2) if nhwc else result()
        if out == "codes":
            meets(got * d.out_step, d.y.clamp(0, 255 * d.out_step), INT8_ERROR)
        else:
            meets(got, d.y, INT8_ERROR)

    return Candidate(f"OpenVINO int8 to {out}", "W8", run, check)


def _w4(p: Gemm, group: int, dynamic: int, threads: int) -> Candidate:
    d = p.data
    codes, step, expected = d.blocks(4, group)
    flat = codes.numpy().reshape(-1) & 15
    packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
    weight = op.convert(op.constant(ov.Tensor(packed, list(codes.shape), Type.i4)), Type.f32)
    weight = op.reshape(op.multiply(weight, op.constant(step.numpy())), np.array([p.n, p.k]), False)
    x = op.parameter([p.m, p.k], Type.f32)
    model = ov.Model([op.matmul(x, weight, False, True)], [x], "gemm")
    run, result = _bound(_compiled(model, threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=dynamic), d.x)

    def check() -> None:
        meets(result(), expected, DYNAMIC_ERROR)

    return Candidate(f"OpenVINO W4 g{group}, x in {dynamic}", "W4", run, check)


def conv(p: Conv, threads: int) -> Iterable[Candidate]:
    d = p.data
    for out in ("float32", "codes"):
        x = op.parameter([p.batch, p.channels, p.size, p.size], Type.u8)
        at = ([p.stride] * 2, [p.padding] * 2, [p.padding] * 2, [1, 1])
        if p.groups > 1:
            grouped = d.w_codes.reshape(p.groups, p.outputs // p.groups, *d.w_codes.shape[1:])
            weight = _weights(grouped, d.w_step.reshape(p.groups, -1, 1, 1, 1))
            y = op.group_convolution(_values(x, d.x_step), weight, *at)
        else:
            y = op.convolution(_values(x, d.x_step), _weights(d.w_codes, d.w_step.reshape(-1, 1, 1, 1)), *at)
        y = op.add(y, op.constant(d.bias.reshape(1, -1, 1, 1).numpy()))
        outer = PrePostProcessor(ov.Model([_codes(y, d.out_step) if out == "codes" else y], [x], "conv"))
        for side in (outer.input(), outer.output()):
            side.tensor().set_layout(Layout("NHWC"))
            side.model().set_layout(Layout("NCHW"))
        yield _int8(_bound(_compiled(outer.build(), threads), d.x_codes), out, d, nhwc=True)


def network(net: Any, threads: int, cache: Path) -> Iterable[Candidate]:
    quantized, floating = _files(net, cache)
    kinds = ((quantized, "int8", "f32"), (quantized, "int8", "bf16"), (floating, "float32", "f32"))
    for path, family, precision in kinds:
        model = core.read_model(path)
        model.reshape({i: list(t.shape) for i, t in zip(model.inputs, net.inputs, strict=True)})
        run, result = _bound(_compiled(model, threads, precision), *net.inputs)
        tolerance = net.int8_error if family == "int8" else 1e-2

        def check(result: Any = result, tolerance: float = tolerance) -> None:
            net.close(result(), tolerance)

        yield Candidate(f"OpenVINO {family}" + (", rest bf16" if precision == "bf16" else ""), family, run, check)


def _files(net: Any, cache: Path) -> tuple[Path, Path]:
    """The network as int8 (NNCF's post-training quantization) and as float32, made once."""
    stem = f"{net.key}-openvino{ov.__version__.split('-')[0]}"
    quantized, floating = cache / f"{stem}.int8.xml", cache / f"{stem}.xml"
    if not quantized.exists():
        import nncf

        nncf.set_log_level(logging.ERROR)
        cache.mkdir(parents=True, exist_ok=True)
        model = ov.convert_model(net.model, example_input=net.inputs)
        ov.save_model(model, floating, compress_to_fp16=False)
        model.reshape({i: [-1, *t.shape[1:]] for i, t in zip(model.inputs, net.inputs, strict=True)})
        names = [i.get_any_name() for i in model.inputs]
        batch = {name: t.numpy() for name, t in zip(names, net.inputs, strict=True)}
        kind = {"model_type": nncf.ModelType.TRANSFORMER} if net.is_transformer else {}
        made = nncf.quantize(model, nncf.Dataset([batch]), preset=nncf.QuantizationPreset.PERFORMANCE, **kind)
        ov.save_model(made, quantized, compress_to_fp16=False)
    return quantized, floating
