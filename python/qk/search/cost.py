"""What a layer costs at a width: bytes as stored, and bit operations. Measured latency is in qk.search.latency."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qk.calibrate import calibrate
from qk.deploy import convert
from qk.deploy.checkpoint import file_bytes
from qk.ops.pack import row_bytes
from qk.prepare.apply import apply_plan
from qk.prepare.prepared import Layer, Prepared
from qk.search.items import Item, plan_of, with_widths
from qk.spec import QuantSpec

NUMBER = 4  # bytes of a step, a zero or a bias
MB, GIGA = 1e6, 1e9
FLOAT_BITS = 32  # of an operand where a layer stays in float


@dataclass(frozen=True)
class Costs:
    """items: of each item at each option. rest: of everything else, whatever is chosen. estimated: what of it was not
    measured, in words."""

    items: list[list[float]]
    rest: float
    estimated: tuple[str, ...] = ()

    def of(self, choice: Sequence[int]) -> float:
        """Of the whole network."""
        return self.rest + sum(row[number] for row, number in zip(self.items, choice, strict=True))


def stored_bytes(layer: Layer, spec: QuantSpec, has_bias: bool) -> int:
    """Of a quantized layer in a checkpoint: packed rows, steps and zeros, bias, and the input's step and zero."""
    n, k = layer.weight_shape[0], prod(layer.weight_shape[1:])
    steps = n * (1 if spec.group_size is None else k // spec.group_size)
    own_input = 0 if spec.dynamic else 2 * NUMBER
    return n * row_bytes(k, spec.storage_bits) + 2 * NUMBER * steps + NUMBER * n * has_bias + own_input


def bit_operations(layer: Layer, spec: QuantSpec) -> float:
    """Of one sample: multiply-accumulates, times the bits of the weight, times those of the activation."""
    widths = FLOAT_BITS**2 if spec.is_float else spec.weights * spec.activations
    return layer.macs / layer.input_shape[0] * widths


def size_costs(p: Prepared, items: Sequence[Item], batch: Any) -> Costs:
    """10^6 bytes of a checkpoint's tensors. batch: for steps, whose values change no size."""
    costs = _by_option(p, items, lambda name, spec: stored_bytes(p.layers[name], spec, _has_bias(p, name)) / MB)
    widest = copy.deepcopy(p)
    apply_plan(widest, plan_of(p, items, [0] * len(items)))
    calibrate(widest, [batch], "minmax")
    return Costs(costs, file_bytes(convert(widest)) / MB - sum(row[0] for row in costs))


def bit_operation_costs(p: Prepared, items: Sequence[Item]) -> Costs:
    """10^9 of one sample; float layers count as 32 times 32 bits, and what is no layer counts nothing."""
    chosen = {name for item in items for name in item.layers}
    rest = sum(bit_operations(layer, p.plan[name]) for name, layer in p.layers.items() if name not in chosen) / GIGA
    return Costs(_by_option(p, items, lambda name, spec: bit_operations(p.layers[name], spec) / GIGA), rest)


def _by_option(p: Prepared, items: Sequence[Item], of: Callable[[str, QuantSpec], float]) -> list[list[float]]:
    """of: what a layer costs with a spec, summed over the layers of each item."""
    return [[sum(of(n, with_widths(p.plan[n], o)) for n in item.layers) for o in item.options] for item in items]


def _has_bias(p: Prepared, name: str) -> bool:
    return p.originals[name].bias is not None
