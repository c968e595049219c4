"""Operators: the definition in torch, the shape rule, the gradient and the public function of each."""

import qk._native  # noqa: F401  registers torch.ops.qk
from qk.ops.conv2d import conv2d
from qk.ops.gemm import gemm
from qk.ops.lsq import lsq
from qk.ops.prepack import prepack

__all__ = ["conv2d", "gemm", "lsq", "prepack"]
