"""Operators: the definition in torch, the shape rule, the gradient and the public function of each."""

import qk._native  # noqa: F401  registers torch.ops.qk
from qk.ops.dequantize import dequantize
from qk.ops.lsq import lsq
from qk.ops.quantize import quantize

__all__ = ["dequantize", "lsq", "quantize"]
