"""Dynamic activations: in front of a Linear, each row of the input gets a step and zero of its own when it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops


class _FakeRows(torch.autograd.Function):
    """Every row as `quantize_rows` codes it. The gradient is x's: the range holds every finite value of its row, so
    nothing is clipped, and the ends, which make the step, would else be the only values without one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return ops.dequantize(*ops.quantize_rows(x, bits))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RowQuantizer(nn.Module):
    """Fake-quantizes [..., K], each row of K values by itself (docs/numerics.md, "Dynamic rows").

    Stands where an ActQuantizer does, but has no step: nothing to calibrate, to learn or to store. passes, mix: as
    there.
    """

    passes: bool = False
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    calibrated = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor, cut: None = None) -> Tensor:
        """cut: None, as SPARQ needs a step that is known."""
        if self.passes or not x.numel():  # without a row there is no step for dequantize
            return x
        x = x.float()  # whatever autocast made of it
        quantized = _FakeRows.apply(x, self.bits)
        return quantized if self.mix is None else self.mix(x, quantized)
