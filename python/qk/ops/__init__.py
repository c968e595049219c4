"""Operators: the definition in torch, the shape rule, the gradient and the public function of each."""

import qk._native  # noqa: F401  registers torch.ops.qk
from qk.ops.fisher_loss import fisher_loss
from qk.ops.lsq import lsq
from qk.ops.range_error import range_error
from qk.ops.rounding_penalty import rounding_penalty
from qk.ops.soft_round import soft_round

__all__ = ["fisher_loss", "lsq", "range_error", "rounding_penalty", "soft_round"]
