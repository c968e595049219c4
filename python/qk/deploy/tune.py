"""Which kernel each convolution runs on, by measurement. Results do not depend on it (docs/winograd.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops
from qk.deploy.modules import IntegerLayer, QConv2d, integer_layers
from qk.errors import fail
from qk.inputs import feed
from qk.timing import alternate, quantile

ALGORITHMS = ("direct", "winograd")

# Of direct's time that winograd must stay below: measurements of two kernels that are alike differ by that.
WORTH = 0.95


def tune_kernels(model: nn.Module, inputs: Any, algorithm: str | None = None) -> dict[str, str]:
    """Chooses the algorithm of every convolution of an integer model and prepacks its weight for it.

    inputs: what the model is called with; only the sizes matter. algorithm: "direct" or "winograd" instead of a
    measurement, for all layers that can have it. The choice is a layer's attribute `algorithm`, kept by copies and
    pickles of the model; a checkpoint holds packed codes alone, so a loaded model chooses again. Returns name ->
    algorithm. The measurement is with the threads and the instruction set of now.
    """
    if algorithm not in (None, *ALGORITHMS):
        raise fail("tune_kernels", "algorithm", "direct, winograd or None", algorithm)
    layers = {name: layer for name, layer in integer_layers(model).items() if isinstance(layer, QConv2d)}
    with _input_sizes(list(layers.values())) as sizes, torch.no_grad():
        if algorithm is None:
            feed(model, inputs)
    measured: dict[Any, str] = {}  # layers of one shape run on one kernel
    for layer in layers.values():
        before, choice = layer.algorithm, "direct"
        if algorithm != "direct" and (other := winograd_weight(layer)) is not None:
            size = sizes.get(layer)
            kind = (size, layer.shape, layer.groups, layer.padding, layer.bits)
            if algorithm is None and kind not in measured:
                measured[kind] = faster(layer, size, other)
            choice = algorithm or measured[kind]
        layer.algorithm = choice
        if choice != before:
            layer.prepack()
    return {name: layer.algorithm for name, layer in layers.items()}


def tuned(model: nn.Module, inputs: Any, algorithm: str | None = None) -> nn.Module:
    """A copy of the model after tune_kernels; the model itself where no layer has a choice."""
    layers = [layer for layer in integer_layers(model).values() if isinstance(layer, QConv2d)]
    if all(winograd_weight(layer) is None and layer.algorithm == "direct" for layer in layers):
        return model
    model = copy.deepcopy(model)
    tune_kernels(model, inputs, algorithm)
    return model


def winograd_weight(layer: QConv2d) -> Tensor | None:
    """The layer's weight prepacked for winograd, or None where that algorithm does not apply."""
    fits = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.input_bits <= 6 and layer.shape[3] >= 16
    if not fits or layer.packed.device.type != "cpu":
        return None
    try:
        return ops.prepack(layer.packed, layer.weight_zero, layer.bits, layer.shape, layer.groups, "winograd")
    except RuntimeError:  # its own conditions: kernel, widths, and transformed weights within int8
        return None


def faster(layer: QConv2d, size: torch.Size | None, winograd: Tensor) -> str:
    """The faster algorithm for an input [B, C, H, W]; direct if the layer was not called."""
    if size is None:
        return "direct"
    batch, channels, height, width = size
    codes = torch.randint(0, 2**layer.input_bits, (batch, height, width, channels), dtype=torch.uint8)
    direct = ops.prepack(layer.packed, layer.weight_zero, layer.bits, layer.shape, layer.groups)

    def call(weight: Tensor, *end: Any) -> Tensor:
        places = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.input_bits)
        step, zero = layer.input_step, layer.input_zero
        return ops.conv2d(codes, step, zero, weight, layer.weight_step, layer.bias, layer.bits, *places, *end)

    # As fused networks have it: an activation function, codes.
    out_step = (call(direct).abs().amax() / 255).nan_to_num(1.0).clamp(min=1e-6).reshape(1)
    end = ("relu", out_step, torch.zeros(1, dtype=torch.int32), 8)
    one, two = alternate([lambda: call(direct, *end), lambda: call(winograd, *end)], seconds=0.05)
    return "winograd" if quantile(two, 0.5) < WORTH * quantile(one, 0.5) else "direct"


@contextmanager
def _input_sizes(layers: list[QConv2d]) -> Iterator[dict[IntegerLayer, torch.Size]]:
    """The size of the first input that each layer gets, as a batch."""
    sizes: dict[IntegerLayer, torch.Size] = {}

    def see(layer: IntegerLayer, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        sizes.setdefault(layer, x.shape if x.dim() == 4 else x.unsqueeze(0).shape)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()
