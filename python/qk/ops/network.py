"""A whole integer network in one call: a list of steps as text (`qk.ops._program`), run without Python between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qk.ops._program import Program, Scale, Step, decode, score_scale
from qk.ops._rows import on_one_device
from qk.ops._shapes import output_shape, shapes, step_shape
from qk.ops.add import reference as add
from qk.ops.attention import reference as attention
from qk.ops.concat import reference as concat
from qk.ops.conv2d import reference as conv2d
from qk.ops.dequantize import reference as dequantize
from qk.ops.gemm import reference as gemm
from qk.ops.index_put import reference as index_put
from qk.ops.index_select import reference as index_select
from qk.ops.lookup import reference as lookup
from qk.ops.multiply import reference as multiply
from qk.ops.pool import reference as pool
from qk.ops.quantize import reference as quantize
from qk.ops.sparq import FAMILIES
from qk.ops.sparq import reference as sparq

_cached = lru_cache(maxsize=64)(decode)


def network(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: str) -> list[Tensor]:
    """Runs a program: float32 or codes in, float32 or codes out, everything between as codes in memory that is reused.

    inputs: one for each input line; float32 of any strides, or uint8 codes. constants: steps float32
    [S], zeros int32 [S], floats float32 [F] and bytes uint8 [B], contiguous, on the device of the inputs. program: text
    of the grammar in `qk.ops._program`; `qk.deploy.program.Builder` makes it and the constants. It is parsed once.
    Returns fresh tensors, one for each output line. Each step gives the bits of the operator of its name.
    Raises RuntimeError that names the line for a program that is not well formed, and for tensors that do not fit it.
    """
    return torch.ops.qk.network(inputs, constants, program)


Weights = Mapping[int, tuple[Tensor, Tensor]]


def reference(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: str, weights: Weights) -> list[Tensor]:
    """The definition, step by step by the definitions of the operators.

    weights: for each prepacked weight, by offset, what it was made from: codes of the weight's shape and zeros.
    """
    return interpret(decode(program), inputs, constants, weights)


def interpret(
    program: Program,
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    weights: Weights,
    watch: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """As `reference`. watch(id, tensor) is told of every value that a step makes."""
    known = {value.id: tensor for value, tensor in zip(program.inputs, inputs, strict=True)}
    values = program.values()
    for step in program.steps:
        operands = [(known[id], *_scale(values[id].scale, constants)) for id in step.inputs]
        known[step.out] = _define(step, operands, constants, weights)
        if watch is not None:
            watch(step.out, known[step.out])
    return [known[o.value] if o.layout == "same" else known[o.value].permute(0, 3, 1, 2) for o in program.outputs]


Operand = tuple[Tensor, Tensor | None, Tensor | None]  # codes, step and zero; or float32, None and None


def _scale(scale: Scale | None, constants: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    if scale is None:
        return None, None
    i = scale.index
    return constants[0][i : i + 1], constants[1][i : i + 1]


def _define(step: Step, operands: list[Operand], constants: Sequence[Tensor], weights: Weights) -> Tensor:
    """What a step makes, by the definition of its operator."""
    x, x_step, x_zero = operands[0]
    a, floats, codes = step.attributes, constants[2], constants[3]
    out = (*_scale(step.scale, constants), 8 if step.scale is None else step.scale.bits)
    activation = a.get("activation", "none")
    if step.op == "quantize":
        return quantize(x if a["layout"] == "same" else x.movedim(1, -1), *out)
    if step.op in ("conv2d", "gemm"):
        weight_step = floats[step.constants["weight_step"] :][: a["n"] * a["k_groups"]].reshape(a["n"], a["k_groups"])
        bias = floats[step.constants["bias"] :][: a["n"]] if "bias" in step.constants else None
        product = (x, x_step, x_zero, *weights[step.constants["weight"]], weight_step, bias)
        epilogue = (activation, *out, *(operands[1] if len(operands) == 2 else ()))
        if step.op == "gemm":
            return gemm(*product, *epilogue)
        return conv2d(*product, a["stride"], a["padding"], a["dilation"], a["groups"], *epilogue)
    if step.op in ("add", "multiply"):
        return (add if step.op == "add" else multiply)(*operands[0], *operands[1], activation, *out)
    if step.op == "pool":
        kernel = tuple(x.shape[1:3]) if a["kernel"] == (0, 0) else a["kernel"]
        window = (kernel, a["stride"], a["padding"], a["dilation"], bool(a["ceil_mode"]), bool(a["count_include_pad"]))
        return pool(*operands[0], a["mode"], *window, None, "none", *out)
    if step.op == "lookup":
        return lookup(x, (floats if step.scale is None else codes)[step.constants["table"] :][:256])
    if step.op == "sparq":
        return sparq(x, *FAMILIES[a["family"]], bool(a["round"]), bool(a["pairs"]), x_zero)
    if step.op == "concat":
        return concat(*map(list, zip(*operands, strict=True)), *out)
    if step.op == "attention":
        mask = operands[3][0] if len(operands) > 3 else None
        return attention(*itertools.chain(*operands[:3]), a["heads"], mask, score_scale(a["score_scale"]), *out)
    if step.op in ("index_put", "index_select"):
        index = _columns(codes, step.constants["index"], a["count"])
        if step.op == "index_select":
            return index_select(x, index)
        source = _columns(codes, step.constants["source"], a["terms"] * a["count"]).reshape(a["terms"], a["count"])
        residual = operands[2] if len(operands) == 3 else (None, None, None)
        return index_put(x, operands[1][0], index, source, *residual, activation, *out)
    if step.op == "reshape":
        return x.reshape(step_shape(step, [tuple(x.shape)]))
    return dequantize(x, x_step, x_zero)


def _columns(bytes: Tensor, offset: int, count: int) -> Tensor:
    return bytes[offset : offset + 4 * count].view(torch.int32)


@torch.library.register_fake("qk::network")
def _(inputs, constants, program):
    on_one_device("network", *inputs, *constants)
    try:
        decoded = _cached(program)
    except ValueError as error:
        raise RuntimeError(f"qk::network: {error}") from None
    known = shapes(decoded, [x.shape for x in inputs])
    values = decoded.values()
    results = []
    for output in decoded.outputs:
        dtype = torch.float32 if values[output.value].scale is None else torch.uint8
        result = inputs[0].new_empty(known[output.value], dtype=dtype)
        output_shape(output, known[output.value])
        results.append(result if output.layout == "same" else result.permute(0, 3, 1, 2))
    return results
