"""Programs of the operator `network`, and a builder that collects their constants."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.deploy.pages import in_huge_pages
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
)
from qk.ops._shapes import output_shape, shapes
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
    u = b.step("quantize", x, layout="nchw", scale=b.scale(input_step, input_zero, 8))
    y = b.step("conv2d", u, weight=prepacked, weight_step=steps, bias=None, bits=4, kernel=(3, 3), stride=(1, 1), ...)
    b.output(y, "nchw")
    torch.ops.qk.network([images], b.constants(), encode(b.program()))
    """

    def __init__(self) -> None:
        self._inputs: list[Value] = []
        self._steps: list[Step] = []
        self._outputs: list[Output] = []
        self._scales: dict[tuple[float, int], int] = {}
        self._floats = _Parts(torch.float32, 1)
        self._bytes = _Parts(torch.uint8, 64)  # prepacked weights begin on a cache line

    def scale(self, step: Tensor, zero: Tensor, bits: int) -> Scale:
        """For codes: step * (code - zero), one value each. Equal scales are kept once."""
        key = (float(step), int(zero))
        return Scale(self._scales.setdefault(key, len(self._scales)), bits)

    def input(self, scale: Scale | None = None) -> int:
        """The id of a new input, float32 without a scale."""
        self._inputs.append(Value(self._next(), scale))
        return self._inputs[-1].id

    def step(self, op: str, *inputs: int, scale: Scale | None = None, **named: Tensor | Attribute | None) -> int:
        """The id of what a new step makes. named: constants (tensors; None is left out) and attributes.

        n and k_groups follow from weight_step [n] or [n, k_groups], count and terms from index and source.
        """
        known = SIGNATURES[op].constants
        tensors = {name: value for name, value in named.items() if name in known and value is not None}
        attributes = {name: value for name, value in named.items() if name not in known}
        if "weight_step" in tensors:
            n, groups = tensors["weight_step"].reshape(len(tensors["weight_step"]), -1).shape
            attributes |= {"n": n, "k_groups": groups}
        if "index" in tensors:
            attributes["count"] = len(tensors["index"])
        if "source" in tensors:
            attributes["terms"] = len(tensors["source"])
        constants = {
            name: (self._floats if value.dtype == torch.float32 else self._bytes).add(value)
            for name, value in tensors.items()
        }
        self._steps.append(Step(op, self._next(), inputs, constants, attributes, scale))
        return self._steps[-1].out

    def output(self, value: int, layout: str = "same") -> None:
        self._outputs.append(Output(value, layout))

    def program(self) -> Program:
        """What was collected; raises ValueError if it is not well formed."""
        program = Program(tuple(self._inputs), tuple(self._steps), tuple(self._outputs))
        check(program)
        return program

    def constants(self) -> list[Tensor]:
        """The four tensors that the program refers to, on the device of the weights."""
        bytes = in_huge_pages(self._bytes.joined())
        scales = list(self._scales)
        steps = torch.tensor([step for step, _ in scales], dtype=torch.float32, device=bytes.device)
        zeros = torch.tensor([zero for _, zero in scales], dtype=torch.int32, device=bytes.device)
        return [steps, zeros, self._floats.joined(), bytes]

    def _next(self) -> int:
        return len(self._inputs) + len(self._steps)


class _Parts:
    """Tensors to be joined into one, as values of its type; the same tensor once."""

    def __init__(self, dtype: torch.dtype, line: int) -> None:
        self.dtype, self.line, self.size = dtype, line, 0
        self.parts: list[Tensor] = []
        self.offsets: dict[int, int] = {}

    def add(self, tensor: Tensor) -> int:
        """The offset of its first value."""
        if id(tensor) not in self.offsets:
            pad = -self.size % self.line
            self.parts += [torch.zeros(pad, dtype=self.dtype, device=tensor.device)] * (pad > 0) + [tensor]
            self.offsets[id(tensor)] = self.size + pad
            self.size += pad + tensor.nbytes // self.dtype.itemsize
        return self.offsets[id(tensor)]

    def joined(self) -> Tensor:
        parts = [part.reshape(-1).view(self.dtype) for part in self.parts]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
