"""What the definitions share: a tensor seen as rows with one step and zero each (docs/numerics.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, in which kernels compute; what comes out is rounded once."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_rows(x: Tensor, step: Tensor) -> Tensor:
    """x as [step.numel(), -1]."""
    return x.reshape(step.numel(), -1) if x.numel() else x.reshape(step.numel(), 0)


def units(x: Tensor, step: Tensor) -> Tensor:
    """x / step by rows, as every kernel computes it: x times the once-rounded reciprocal, float32."""
    return as_rows(x, step) * (1.0 / step.reshape(-1, 1))


def codes(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """clamp(rint(x / step) + zero, 0, 2^bits - 1) by rows, as float32; NaN gives the code zero."""
    z = zero.reshape(-1, 1).to(torch.float32)
    t = torch.nan_to_num(units(x, step), nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return torch.clamp(torch.round(t) + z, 0, 2**bits - 1)


def fake_quantize(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The definition of a quantized tensor's float values: step * (code - zero). Shape of x."""
    z = zero.reshape(-1, 1).to(torch.float32)
    return ((codes(x, step, zero, bits) - z) * step.reshape(-1, 1)).reshape(x.shape)


def on_one_device(op: str, *tensors: Tensor | None) -> None:
    """For fakes: one tensor on meta would otherwise turn a call with CPU tensors into one without a result."""
    if len(devices := {str(t.device) for t in tensors if t is not None}) > 1:
        raise RuntimeError(f"qk::{op}: tensors must be on one device, got {', '.join(sorted(devices))}.")
