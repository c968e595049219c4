"""Adaptive rounding: learn for each weight whether to round down or up.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (2020), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk import ops
from qk.ops.soft_round import start
from qk.prepare.insert import QuantLayer, from_kernel_order, to_kernel_order

DECIDED = 20.0  # a v far beyond saturation


def beta(iteration: int, iterations: int, warmup: float, ends: tuple[float, float]) -> float:
    """The penalty's exponent: the start through the warmup, then linearly to the end."""
    first = warmup * iterations
    done = max(0.0, (iteration - first) / (iterations - first))
    return ends[0] + (ends[1] - ends[0]) * done


class Rounding:
    """The v of one layer while it is learned, and what follows from it.

    With one step for each output channel everything stays in the layout of the layer's weight: a row is the same set of
    weights in either order, and the convolution needs no copy. Groups along K need the kernels' order. Of a channel
    with several points the last one is learned: it rounds what those before it leave of the weight.
    """

    def __init__(self, layer: QuantLayer) -> None:
        self.layer = layer
        self.kernel_order = layer.groups_along_k > 1
        self.fixed = layer.fixed_weight()
        weight = layer.weight.detach() if self.fixed is None else layer.weight.detach() - self.fixed
        self.weight = to_kernel_order(weight) if self.kernel_order else weight.contiguous()
        self.step, self.zero, self.bits = layer.last_step, layer.weight_zero, layer.spec.weights
        sparse = layer.spec.sparq is not None and layer.spec.sparq.pairs == "weights"
        self.stays_zero = self.weight == 0 if sparse else None  # 2:4 sparse it remains
        self.v = start(self.weight, self.step).requires_grad_()
        self.value: Tensor | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """An iteration: `value` becomes the soft weight, for whose gradient a backward pass asks."""
        self.value = self.soft().requires_grad_()

    @torch.no_grad()
    def end(self, penalty: Tensor) -> None:
        """Takes the gradient of `value` on to v, with that of penalty[0] * rounding_penalty(v, penalty[1]) added: one
        kernel."""
        assert self.value is not None
        grad = torch.zeros_like(self.value) if self.value.grad is None else self.value.grad  # no call of the layer
        grad = to_kernel_order(grad) if self.kernel_order else grad
        if self.stays_zero is not None:
            grad = grad.masked_fill(self.stays_zero, 0.0)
        quantizer = self.step, self.zero, self.bits
        self.v.grad = torch.ops.qk.soft_round_backward(grad, self.weight, self.v, *quantizer, penalty)
        self.value = None

    def soft(self) -> Tensor:
        """The weight with h(v) added to its floor, in the layout of layer.weight. Differentiable in v."""
        soft = ops.soft_round(self.weight, self.v, self.step, self.zero, self.bits)
        if self.fixed is not None:
            return self.fixed + soft
        if self.stays_zero is not None:
            soft = soft.masked_fill(self.stays_zero, 0.0)
        return from_kernel_order(soft).contiguous() if self.kernel_order else soft

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Up where h(v) >= 0.5, that is v >= 0; uint8 in the kernels' order."""
        decided = torch.where(self.v >= 0, DECIDED, -DECIDED).to(self.v.dtype)
        hard = ops.soft_round(self.weight, decided, self.step, self.zero, self.bits)
        if self.stays_zero is not None:
            hard = hard.masked_fill(self.stays_zero, 0.0)
        codes = ops.quantize(hard, self.step, self.zero, self.bits)
        return codes if self.kernel_order else to_kernel_order(codes)
