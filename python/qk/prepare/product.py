"""The product of a layer's input and weight, in numbers of 16 bits where that takes less time."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MACS = 128  # for each value that is converted. Below it converting costs what the product gains (docs/methods/brecq.md)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_args: dict | None, narrow: torch.dtype | None = None
) -> Tensor:
    """A Linear's, or with arguments for F.conv2d a convolution's. narrow: what x and weight are rounded to first, where
    that pays; the result has their type, the bias is added to it as it is."""
    if conv_args is None:
        multiply = F.linear
    else:  # a weight in channels_last would have the result lie so too, and a model may ask a view of it
        multiply, weight = partial(F.conv2d, **conv_args), weight.contiguous()
    if narrow is None or not pays(x, weight, conv_args):
        return multiply(x, weight, bias)
    found = multiply(x.to(narrow), weight.to(narrow))
    if bias is None:
        return found.to(x.dtype)
    return found + (bias if conv_args is None else bias[:, None, None])  # of the bias's type, in one pass


def pays(x: Tensor, weight: Tensor, conv_args: dict | None) -> bool:
    """Whether the product has enough multiply-adds for each value of x, weight and result."""
    stride, groups = (1, 1) if conv_args is None else (math.prod(conv_args["stride"]), conv_args["groups"])
    results = x.numel() // (weight.shape[1] * groups) * weight.shape[0] / stride
    return results * weight[0].numel() >= MACS * (x.numel() + weight.numel() + results)
