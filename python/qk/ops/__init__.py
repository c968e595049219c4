"""Operators: the definition in torch, the shape rule, the gradient and the public function of each."""

import qk._native  # noqa: F401  registers torch.ops.qk
from qk.ops.add import add
from qk.ops.attention import attention
from qk.ops.concat import concat
from qk.ops.conv2d import conv2d
from qk.ops.dequantize import dequantize
from qk.ops.embedding_bag import embedding_bag
from qk.ops.fisher_loss import fisher_loss, fisher_loss_and_slope
from qk.ops.gemm import gemm
from qk.ops.gemm_weight_only import gemm_weight_only
from qk.ops.index_put import index_put
from qk.ops.index_select import index_select
from qk.ops.lookup import lookup
from qk.ops.lsq import lsq
from qk.ops.multiply import multiply
from qk.ops.network import network
from qk.ops.pack import pack
from qk.ops.pool import pool
from qk.ops.prepack import prepack
from qk.ops.quantize import quantize
from qk.ops.quantize_rows import quantize_rows
from qk.ops.range_error import range_error
from qk.ops.rounding_penalty import rounding_penalty
from qk.ops.soft_round import soft_round
from qk.ops.sparq import sparq
from qk.ops.sparq_pack import sparq_pack
from qk.ops.sparq_unpack import sparq_unpack
from qk.ops.unpack import unpack

__all__ = [
    "add",
    "attention",
    "concat",
    "conv2d",
    "dequantize",
    "embedding_bag",
    "fisher_loss",
    "fisher_loss_and_slope",
    "gemm",
    "gemm_weight_only",
    "index_put",
    "index_select",
    "lookup",
    "lsq",
    "multiply",
    "network",
    "pack",
    "pool",
    "prepack",
    "quantize",
    "quantize_rows",
    "range_error",
    "rounding_penalty",
    "soft_round",
    "sparq",
    "sparq_pack",
    "sparq_unpack",
    "unpack",
]
