"""Programs of the operator `network`, and a builder that collects their constants."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._program import (
    SIGNATURES,
    Attribute,
    Output,
    Program,
    Scale,
    Signature,
    Step,
    Value,
    check,
    decode,
    encode,
    output_shape,
    shapes,
)
from qk.ops.network import interpret

__all__ = [
    "SIGNATURES",
    "Attribute",
    "Builder",
    "Output",
    "Program",
    "Scale",
    "Signature",
    "Step",
    "Value",
    "check",
    "decode",
    "encode",
    "interpret",
    "output_shape",
    "shapes",
]


class Builder:
    """Collects values, steps and constants.

    b = Builder()
    x = b.input()
    s = b.scale(torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32), 8)
    u = b.step("quantize", x, layout="nchw", scale=s)
    y = b.step("conv2d", u, weight=prepacked, weight_step=steps, bias=None, bits=4, kernel=(3, 3), stride=(1, 1), ...)
    b.output(y, "nchw")
    torch.ops.qk.network([images], b.constants, encode(b.program()))
    """

    def __init__(self) -> None:
        self.constants: list[Tensor] = []
        self._inputs: list[Value] = []
        self._steps: list[Step] = []
        self._outputs: list[Output] = []
        self._index: dict[object, int] = {}

    def constant(self, tensor: Tensor) -> int:
        """Its index. The same tensor, or one value that was there before, is kept once."""
        one = tensor.numel() == 1 and tensor.dtype in (torch.float32, torch.int32) and not tensor.is_meta
        key = (tensor.dtype, tensor.item()) if one else id(tensor)
        if key not in self._index:
            self._index[key] = len(self.constants)
            self.constants.append(tensor)
        return self._index[key]

    def scale(self, step: Tensor, zero: Tensor, bits: int) -> Scale:
        return Scale(self.constant(step), self.constant(zero), bits)

    def input(self, scale: Scale | None = None) -> int:
        """The id of a new input, float32 without a scale."""
        self._inputs.append(Value(self._next(), scale))
        return self._inputs[-1].id

    def step(self, op: str, *inputs: int, scale: Scale | None = None, **named: Tensor | Attribute | None) -> int:
        """The id of what a new step makes. named: constants (tensors; None is left out) and attributes."""
        known = SIGNATURES[op].constants
        constants = {name: self.constant(value) for name, value in named.items() if name in known and value is not None}
        attributes = {name: value for name, value in named.items() if name not in known}
        self._steps.append(Step(op, self._next(), inputs, constants, attributes, scale))
        return self._steps[-1].out

    def output(self, value: int, layout: str = "same") -> None:
        self._outputs.append(Output(value, layout))

    def program(self) -> Program:
        """What was collected; raises ValueError if it is not well formed."""
        program = Program(tuple(self._inputs), tuple(self._steps), tuple(self._outputs))
        check(program)
        return program

    def _next(self) -> int:
        return len(self._inputs) + len(self._steps)
