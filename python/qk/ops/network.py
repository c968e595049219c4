"""A whole integer network in one call: a list of steps as text (`qk.ops._program`), run without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.ops._program import Program, Scale, Step, decode, output_shape, shapes, step_shape
from qk.ops._rows import codes as _codes
from qk.ops.conv2d import reference as _conv2d_reference
from qk.ops.gemm import reference as _gemm_reference

_cached = lru_cache(maxsize=64)(decode)


def network(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: str) -> list[Tensor]:
    """Runs a program: float32 or codes in, float32 or codes out, everything between as codes in memory that is reused.

    inputs: one for each input line; float32 of any strides, or uint8 codes. constants: prepacked weights, their steps,
    biases, tables, and the steps and zeros of codes, by index; contiguous, on the device of the inputs. program: text
    of the grammar in `qk.deploy.program`, from `encode`; parsed once.
    Returns fresh tensors, one for each output line. Each step gives the bits of the operator of its name.
    Raises RuntimeError that names the line for a program that is not well formed, and for tensors that do not fit it.
    """
    return torch.ops.qk.network(inputs, constants, program)


Weights = Mapping[int, tuple[Tensor, Tensor]]


def reference(inputs: Sequence[Tensor], constants: Sequence[Tensor], program: str, weights: Weights) -> list[Tensor]:
    """The definition, step by step by the definitions of the operators.

    weights: for each prepacked constant, by index, what it was made from: codes of the weight's shape and zeros.
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
    values = program.values()
    known = {value.id: tensor for value, tensor in zip(program.inputs, inputs, strict=True)}

    def scale(id: int) -> tuple[Tensor, Tensor] | None:
        s = values[id].scale
        return None if s is None else (constants[s.step], constants[s.zero])

    def real(id: int) -> Tensor:
        """The float32 values that a value stands for."""
        s = scale(id)
        return known[id] if s is None else (known[id].float() - s[1].float()) * s[0]

    def finish(y: Tensor, step: Step) -> Tensor:
        activation = step.attributes.get("activation", "none")
        y = {"none": lambda: y, "relu": y.relu, "relu6": lambda: y.clamp(0.0, 6.0)}[activation]()
        return y if step.scale is None else to_codes(y, step.scale)

    def to_codes(y: Tensor, s: Scale) -> Tensor:
        return _codes(y, constants[s.step], constants[s.zero], s.bits).to(torch.uint8).reshape(y.shape)

    for step in program.steps:
        x, a = known[step.inputs[0]], step.attributes
        if step.op == "quantize":
            y = to_codes(x if a["layout"] == "same" else x.movedim(1, -1), step.scale)
        elif step.op in ("conv2d", "gemm"):
            y = _integer(step, x, scale(step.inputs[0]), constants, weights)
            if len(step.inputs) == 2:
                y = y + real(step.inputs[1])
            y = finish(y, step)
        elif step.op == "add":
            y = finish(real(step.inputs[0]) + real(step.inputs[1]), step)
        elif step.op == "multiply":
            y = finish(real(step.inputs[0]) * real(step.inputs[1]), step)
        elif step.op == "pool":
            y = _pool(step, x, scale(step.inputs[0]))
            y = y if a["mode"] == "max" else finish(y, step)
        elif step.op == "lookup":
            y = constants[step.constants["table"]][x.long()]
        elif step.op == "concat":
            y = torch.cat(
                [_requantized(values[id].scale, step.scale, known[id], real, to_codes, id) for id in step.inputs], -1
            )
        elif step.op == "reshape":
            y = x.reshape(step_shape(step, [tuple(x.shape)], []))
        else:
            y = real(step.inputs[0])
        known[step.out] = y
        if watch is not None:
            watch(step.out, y)
    return [known[o.value] if o.layout == "same" else known[o.value].permute(0, 3, 1, 2) for o in program.outputs]


def _requantized(have, want, codes, real, to_codes, id):
    return codes if have == want else to_codes(real(id), want)


def _integer(
    step: Step, x: Tensor, scale: tuple[Tensor, Tensor], constants: Sequence[Tensor], weights: Weights
) -> Tensor:
    a, c = step.attributes, step.constants
    codes, zero = weights[c["weight"]]
    bias = constants[c["bias"]] if "bias" in c else None
    arguments = (x, *scale, codes, zero, constants[c["weight_step"]], bias)
    if step.op == "gemm":
        return _gemm_reference(*arguments)
    return _conv2d_reference(*arguments, a["stride"], a["padding"], a["dilation"], a["groups"])


def _pool(step: Step, x: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    """max: codes. average: float(exact sum) * float(step / count)."""
    a, (s, zero) = step.attributes, scale
    image = x.double().permute(0, 3, 1, 2)
    kernel = x.shape[1:3] if a["kernel"] == (0, 0) else a["kernel"]
    window = (kernel, a["stride"], a["padding"])
    if a["mode"] == "max":
        return F.max_pool2d(image, *window, a["dilation"], bool(a["ceil_mode"])).permute(0, 2, 3, 1).to(torch.uint8)
    sums = F.avg_pool2d(image - zero.double(), *window, bool(a["ceil_mode"]), True, divisor_override=1)
    ones = torch.ones_like(image[:1, :1])
    if a["count_include_pad"]:
        ones = F.pad(ones, (a["padding"][1],) * 2 + (a["padding"][0],) * 2, value=1.0)
        window = (kernel, a["stride"], 0)
    counts = F.avg_pool2d(ones, *window, bool(a["ceil_mode"]), True, divisor_override=1)
    return (sums.float() * (s / counts.float())).permute(0, 2, 3, 1)


@torch.library.register_fake("qk::network")
def _(inputs, constants, program):
    try:
        decoded = _cached(program)
    except ValueError as error:
        raise RuntimeError(f"qk::network: {error}") from None
    known = shapes(decoded, [x.shape for x in inputs], [c.shape for c in constants])
    values = decoded.values()
    results = []
    for output in decoded.outputs:
        dtype = torch.float32 if values[output.value].scale is None else torch.uint8
        result = inputs[0].new_empty(known[output.value], dtype=dtype)
        output_shape(output, known[output.value])
        results.append(result if output.layout == "same" else result.permute(0, 3, 1, 2))
    return results
