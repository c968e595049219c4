"""Some columns of a layer's result in place of others: those of channels that are sums of several rows."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._epilogue import result_dtype
from qk.ops._rows import on_one_device
from qk.ops._values import result, value


def index_put(
    x: Tensor,
    added: Tensor,
    index: Tensor,
    source: Tensor,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """x, but with another result in the columns index[u]: that of a sum of columns of added.

    x: [..., N], float32, or with out_step uint8 codes. added: [..., T], float32, of the shape of x but for the last
    size. index: int32 [count], different columns. source: int32 [terms, count]: y = added[..., source[0, u]], plus
    added[..., source[1, u]] and so on, each sum rounded; -1 stands for no term. residual: [..., N], added last:
    float32, or uint8 codes with a step (float32) and a zero (int32) of one value each. The rest as in `add`.
    Returns the shape and type of x, contiguous.
    Raises RuntimeError for another dtype, device or shape, and on the CPU for a column that there is not and for a
    step or zero outside its range.
    """
    end = (residual, residual_step, residual_zero, activation, out_step, out_zero, out_bits)
    return torch.ops.qk.index_put(x, added, index, source, *end)


def reference(
    x: Tensor,
    added: Tensor,
    index: Tensor,
    source: Tensor,
    residual: Tensor | None = None,
    residual_step: Tensor | None = None,
    residual_zero: Tensor | None = None,
    activation: str = "none",
    out_step: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """The definition."""
    out = x.clone(memory_format=torch.contiguous_format)
    for u, column in enumerate(index.tolist()):
        y = torch.zeros(x.shape[:-1], device=x.device)
        for p, s in enumerate(source[:, u].tolist()):
            if s >= 0:
                y = y + added[..., s] if p else added[..., s]
        if residual is not None:
            y = y + value(residual, residual_step, residual_zero)[..., column]
        out[..., column] = result(y, activation, out_step, out_zero, out_bits)
    return out


@torch.library.register_fake("qk::index_put")
def _(
    x,
    added,
    index,
    source,
    residual=None,
    residual_step=None,
    residual_zero=None,
    activation="none",
    out_step=None,
    out_zero=None,
    out_bits=8,
):
    on_one_device("index_put", x, added, index, source, residual, residual_step, residual_zero, out_step, out_zero)
    return torch.empty(x.shape, dtype=result_dtype(out_step), device=x.device)
