"""Attention on codes: exact integer products, weights of 8 bits relative to the largest of their row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qk.ops._epilogue import result_dtype
from qk.ops._rows import on_one_device
from qk.ops._values import result

# 255 * 2^f for f in [-1/2, 1/2], from the highest power down: the smallest relative error, 1.0e-4, with 255 at 0.
POWER = (14.027276992797852, 61.7637939453125, 176.78713989257812, 255.0)
FARTHEST = 16  # halvings: beyond, a weight is 0
LONGEST_DEPTH, MOST_KEYS = 16512, 33025  # of kernels: scores and sums in int32 (csrc/ops/attention.h)


def attention(
    q: Tensor,
    q_step: Tensor,
    q_zero: Tensor,
    k: Tensor,
    k_step: Tensor,
    k_zero: Tensor,
    v: Tensor,
    v_step: Tensor,
    v_zero: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """softmax(scale * q k^T) v for each head, as torch's scaled_dot_product_attention, from codes.

    q: [B, queries, heads * D], k: [B, keys, heads * D], v: [B, keys, heads * E], uint8 codes as layers make them, heads
    side by side. Steps: float32 and zeros: int32, one value each. mask: bool or uint8 [B or 1, queries or 1, keys], not
    0 where a query sees a key; it holds for all heads. scale: 1 / sqrt(D) if not given; as float32.
    Scores are exact sums s in int32. A key's weight is an integer from 0 to 255, 255 * exp(scale * (s - largest s of
    the row)) rounded, the exponential by a cubic of relative error 1e-4; the result is float(sum of weight *
    (v - v_zero)) * (v_step / float(sum of weights)), and 0 where a query sees no key. docs/numerics.md has the order of
    roundings.
    Returns [B, queries, heads * E], contiguous: float32, or uint8 codes with out_step.
    Raises RuntimeError for another dtype, device or shape, D above 16,512, more than 33,025 keys, a scale that is not
    positive, and on the CPU for a step or zero outside its range.
    """
    return torch.ops.qk.attention(
        q, q_step, q_zero, k, k_step, k_zero, v, v_step, v_zero, heads, mask, scale, out_step, out_zero, out_bits
    )


def reference(
    q: Tensor,
    q_step: Tensor,
    q_zero: Tensor,
    k: Tensor,
    k_step: Tensor,
    k_zero: Tensor,
    v: Tensor,
    v_step: Tensor,
    v_zero: Tensor,
    heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """The definition. Sums of integers are made in float64, which holds them exactly."""
    query, key, value = (_by_head(*t, heads) for t in ((q, q_zero), (k, k_zero), (v, v_zero)))
    scores = query @ key.transpose(-1, -2)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        seen &= (mask != 0).unsqueeze(1)
    weights = _weights(scores, seen, q_step * k_step * _exponent(scale, query.shape[-1]))
    total = weights.sum(-1, keepdim=True).float()
    ratio = torch.where(total > 0, v_step / total, 0.0)
    y = (weights @ value).float() * ratio
    y = y.transpose(1, 2).flatten(2)
    return result(y, "none", out_step, out_zero, out_bits)


def _by_head(u: Tensor, zero: Tensor, heads: int) -> Tensor:
    """[B, heads, rows, D]."""
    batch, rows, columns = u.shape
    return (u.double() - zero.double()).reshape(batch, rows, heads, columns // heads).transpose(1, 2)


def _exponent(scale: float | None, depth: int) -> Tensor:
    """What takes a product of steps to halvings: the scale as float32, times log2(e)."""
    scale = torch.tensor(1 / math.sqrt(depth) if scale is None else scale, dtype=torch.float32)
    return (scale.double() * math.log2(math.e)).float()


def _weights(scores: Tensor, seen: Tensor, halvings: Tensor) -> Tensor:
    """0 to 255 as float64. halvings: of a weight for each unit of a score."""
    if scores.shape[-1] == 0:
        return scores
    top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    t = torch.where(seen, top - scores, torch.inf).float() * halvings.to(scores.device)
    t = torch.where(t < FARTHEST, t, float(FARTHEST))
    n = torch.round(t)
    f = n - t
    power = ((POWER[0] * f + POWER[1]) * f + POWER[2]) * f + POWER[3]
    halved = torch.tensor([2.0**-i for i in range(FARTHEST + 1)], device=scores.device)[n.long()]
    return torch.where(seen, torch.round(power * halved), 0.0).double()


@torch.library.register_fake("qk::attention")
def _(
    q, q_step, q_zero, k, k_step, k_zero, v, v_step, v_zero, heads, mask=None, scale=None, out_step=None, out_zero=None,
    out_bits=8,
):  # fmt: skip
    on_one_device("attention", q, q_step, q_zero, k, k_step, k_zero, v, v_step, v_zero, mask, out_step, out_zero)
    return torch.empty((*q.shape[:2], v.shape[2]), dtype=result_dtype(out_step), device=q.device)
