"""torch's MultiheadAttention with its projections as layers of their own, which can be quantized.

`nn.MultiheadAttention` multiplies by its weights itself, and one fused call does it all: no layer is there to quantize.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from qk.prepare.support import owners_of, place_of
from qk.prepare.tree import has_hooks, replace_module


class ProjectedAttention(nn.Module):
    """Computes what the nn.MultiheadAttention does of which it is made, with its weights, in four Linear: q_proj,
    k_proj, v_proj and out_proj. Arguments, results and shapes are those of nn.MultiheadAttention."""

    # What torch's encoder layers ask of their attention; None of the first keeps them from their own fused call.
    in_proj_bias = in_proj_weight = bias_k = bias_v = None
    add_zero_attn = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.kdim, self.vdim, self._qkv_same_embed_dim = source.kdim, source.vdim, source._qkv_same_embed_dim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        if source.in_proj_weight is None:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        else:
            weights = source.in_proj_weight.chunk(3)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says what attn_mask is; expected attn_mask, got None")
        is_batched = query.dim() == 3
        rows = [self.q_proj(query), self.k_proj(key), self.v_proj(value)]
        if not is_batched:
            rows = [x.unsqueeze(0) for x in rows]
        elif not self.batch_first:
            rows = [x.transpose(0, 1) for x in rows]
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in rows)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(key_padding_mask, attn_mask, is_batched, q)
        weights, dropout = None, self.dropout if self.training else 0.0
        if need_weights:
            scores = q * math.sqrt(1 / self.head_dim) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout, self.training)
            joined = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights[0]
        else:
            joined = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        joined = joined.transpose(1, 2).reshape(*rows[0].shape)
        if not is_batched:
            joined = joined[0]
        elif not self.batch_first:
            joined = joined.transpose(0, 1)
        return self.out_proj(joined), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made


def _mask(padding: Tensor | None, mask: Tensor | None, is_batched: bool, q: Tensor) -> Tensor | None:
    """One mask that broadcasts to [batch, heads, queries, keys]: boolean, True where attention goes, if those given are
    boolean (True where it does not), else what is added to the scores."""
    given = []
    if padding is not None:
        given.append((padding if is_batched else padding[None])[:, None, None])
    if mask is not None:
        given.append(mask if mask.dim() == 2 else mask.unflatten(0, q.shape[:2]))
    if all(m.dtype == torch.bool for m in given):
        found = [~m for m in given]
        return found[0] & found[-1] if found else None
    return sum(
        torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m for m in given
    )


def projectable(model: nn.Module) -> list[str]:
    """Names of the attentions of which projections can be made: torch's own class as it is, with nothing on it that
    would be lost."""
    owners = owners_of(model)
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
        and "forward" not in vars(module)
        and type(module.out_proj) is NonDynamicallyQuantizableLinear
        and module.bias_k is None
        and not module.add_zero_attn
        and not any(has_hooks(m) or parametrize.is_parametrized(m) for m in module.modules())
        and all(owners[place_of(p)] == 1 for p in module.parameters())
    ]


def project(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Puts projections in the place of these attentions. Returns the model, or what stands in its place."""
    for name in names:
        old = model.get_submodule(name)
        new = ProjectedAttention(old)
        if old is model:
            return new
        replace_module(model, old, new)
    return model


def projected_copy(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A model with the tensors of this one, in which projections stand in the place of these attentions."""
    own = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return project(copy.deepcopy(model, own), names) if names else model
