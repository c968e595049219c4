"""Second moments of the inputs of layers: with them the mean squared output of any weight is known, without the data.

With X the rows that a layer's weight is multiplied with (for a convolution, the patches), the output of a row d has the
mean square d^T (X^T X / rows) d. Exact, and as large for a million images as for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from qk.calibrate.batches import Stop, call, unpadded
from qk.errors import fail
from qk.inputs import evaluating, tensors_in
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Layer, Prepared

CHUNK = 2**22  # values of patches at once
FLOAT = 4  # bytes


class SecondMoments:
    """Of one layer. groups: of the convolution, each with its own. k: columns of a weight's row, in the kernels' order.

    Fewer rows than columns are kept as they are; when there are as many, their products take the place.
    limit: bytes that these may take.
    """

    def __init__(self, name: str, groups: int, k: int, limit: int) -> None:
        self.name, self.groups, self.k, self.limit = name, groups, k, limit
        self.count = 0
        self.rows: list[Tensor] = []
        self.products: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """rows: [groups, M, K], float32."""
        self.count += rows.shape[1]
        if self.products is not None:
            self.products.baddbmm_(rows.mT, rows)
            return
        self.rows.append(rows.clone())  # the model may write into its own
        if self.count >= self.k:
            if self.groups * self.k**2 * FLOAT > self.limit:
                got = f"{self.groups} of {self.k} x {self.k} values for {self.name}"
                advice = "Raise memory_mb, or give the layer points 1 in overrides."
                raise fail("qk.multipoint", "memory_mb", "room for the second moments of one layer", got, advice)
            together = torch.cat(self.rows, 1)
            self.products, self.rows = together.mT @ together, []

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite, and no product overflowed."""
        tensors = self.rows if self.products is None else [self.products]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def between(self, weights: Tensor) -> Tensor:
        """weights: [V, N, K]. Returns float64 [N, V, V]: the mean product of the outputs of each two, by channel."""
        v, _, k = weights.shape
        grouped = weights.float().reshape(v, self.groups, -1, k).transpose(0, 1).reshape(self.groups, -1, k)
        if self.products is None:
            left = right = grouped @ torch.cat(self.rows, 1).mT
        else:
            left, right = grouped, grouped @ self.products
        left, right = (x.reshape(self.groups, v, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1) for x in (left, right))
        return left.double() @ right.double().mT / self.count


def patches(layer: QuantLayer, x: Tensor) -> Iterator[Tensor]:
    """The rows that the weight meets, [groups, M, K] with K in the kernels' order; a bounded part at a time."""
    x = x.float()
    if layer.conv_args is None:
        for rows in x.reshape(-1, x.shape[-1]).split(max(1, CHUNK // x.shape[-1])):
            yield rows[None]
        return
    _, c, kh, kw = layer.weight.shape
    groups, (stride, width_stride) = layer.conv_args["groups"], layer.conv_args["stride"]
    dilation = layer.conv_args["dilation"]
    ph, pw = layer.conv_args["padding"]
    x = F.pad(x if x.dim() == 4 else x[None], (pw, pw, ph, ph))
    reach = dilation[0] * (kh - 1) + 1
    height = (x.shape[2] - reach) // stride + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // width_stride + 1
    line = groups * c * kh * kw * width  # values of patches for a row of the output
    lines = min(height, max(1, CHUNK // line))
    for images in x.split(max(1, CHUNK // (line * height))):
        for first in range(0, height, lines):
            last = min(first + lines, height)
            band = images[:, :, first * stride : (last - 1) * stride + reach]
            found = F.unfold(band, (kh, kw), dilation, 0, (stride, width_stride))  # [B, C kh kw, positions]
            found = found.reshape(len(images), groups, c, kh * kw, -1).permute(1, 0, 4, 3, 2)
            yield found.reshape(groups, -1, kh * kw * c)


def second_moments(
    p: Prepared, names: list[str], batches: list, stage: str, memory_mb: int, quantized: bool = False
) -> Iterator[tuple[str, SecondMoments]]:
    """(name, moments of the inputs) of these layers in turn; as many at a time as fit, with one pass over the batches.

    quantized: inputs as they are with every layer before quantized, and as the layer itself quantizes them.
    Raises QkError for a batch that the model does not take, inputs that are not finite, data that reaches a layer not
    at all, and a layer that does not fit by itself.
    """
    limit = memory_mb * 2**20
    samples = sum(next(tensors_in(batch)).shape[:1].numel() for batch in batches)
    waiting = list(names)
    while waiting:
        taken, room = [], limit
        while waiting and (not taken or _most_bytes(p.layers[waiting[0]], p, samples) <= room):
            taken.append(waiting.pop(0))
            room -= _most_bytes(p.layers[taken[-1]], p, samples)
        found = _observed(p, taken, batches, stage, limit, quantized)
        while taken:
            name = taken.pop(0)
            yield name, found.pop(name)


def _most_bytes(layer: Layer, p: Prepared, samples: int) -> int:
    """What the moments may take, twice: rows and products lie side by side once."""
    groups, k = _sizes(p.quant_layers()[layer.name])
    positions = layer.macs // (layer.weight_shape[0] * k) / layer.input_shape[0]
    return 2 * FLOAT * groups * k * min(k, int(positions * samples) + 1)


def _sizes(layer: QuantLayer) -> tuple[int, int]:
    return (1 if layer.conv_args is None else layer.conv_args["groups"]), layer.weight[0].numel()


def _observed(
    p: Prepared, names: list[str], batches: list, stage: str, limit: int, quantized: bool
) -> dict[str, SecondMoments]:
    layers = p.quant_layers()
    found = {name: SecondMoments(name, *_sizes(layers[name]), limit) for name in names}
    ends = p.layers[names[-1]].calls == 1
    batch = None

    def sees(name: str) -> Callable:
        def see(layer: QuantLayer, args: tuple, kwargs: dict) -> None:
            x = layer.taken(*args, **kwargs)
            for rows in patches(layer, unpadded(batch, layer.input(x) if quantized else x)):
                found[name].add(rows)
            if ends and name == names[-1]:
                raise Stop

        return see

    with ExitStack() as stack, evaluating(p.model), p.quantized(None if quantized else set()):
        for name in names:
            stack.callback(layers[name].register_forward_pre_hook(sees(name), with_kwargs=True).remove)
        for index, batch in enumerate(batches):
            with suppress(Stop):
                call(p, batch, index, stage)
    for name, moments in found.items():
        if moments.count == 0:
            raise fail(stage, "batches", f"data that reaches {name or 'the model'}", "none that does")
        if not moments.is_finite:
            advice = "Look for it in the batches, then in what the model computes before that layer."
            raise fail(stage, f"what reaches {name or 'the model'}", "finite", "NaN or infinity", advice)
    return found
