"""Steps of every tensor at every width, from what was seen on the calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from qk import ops
from qk.calibrate import ranges as find
from qk.calibrate.observe import Observer
from qk.deploy.fusing.running import run
from qk.errors import fail
from qk.hago import integers
from qk.hago.topology import STAGE, Bits, Dimension, Topology
from qk.prepare.insert import to_kernel_order

Ranges = Literal["mse", "minmax", "average"]


@dataclass(frozen=True)
class Grid:
    """Of a tensor: step float32 [1], or [N] of a weight; codes of `bits` with zeros, or integers within limit."""

    step: Tensor
    zero: Tensor
    bits: int

    @property
    def limit(self) -> int:
        """The largest magnitude where the zero is 0: one code of a signed type is left out."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Weight:
    """codes: uint8 in kernel order where arithmetic is float32, else int8 in the layout of the float weight, with the
    bias in steps of the sums."""

    codes: Tensor
    grid: Grid
    bias: Tensor | None = None


class Grids:
    """ranges: "mse" clips where that makes the error of the values smaller, "minmax" not at all, "average" is the mean
    of the batches' ranges (HAGO). Tensors of more than 8 bits and joined ones are not clipped. known: step and zero of
    activations that were found before, by the names of their dimensions."""

    def __init__(
        self,
        topology: Topology,
        batches: Iterable[Any],
        ranges: Ranges = "mse",
        known: Mapping[str, tuple[float, int]] | None = None,
    ) -> None:
        if ranges not in get_args(Ranges):
            raise fail(STAGE, "ranges", f"one of {', '.join(get_args(Ranges))}", repr(ranges))
        self.topology, self.ranges, self.known = topology, ranges, known or {}
        self.hardware = topology.hardware
        activations = [d for d in topology.dimensions if not d.is_weight]
        unknown = [d for d in activations if d.name not in self.known]
        self.seen = {x: Observer(x.name) for d in unknown for x in (d.source, *d.joined)}
        for batch in batches if unknown else ():
            run(topology.constants, batch, self._watch)
        for node, seen in self.seen.items():
            if not seen.seen or not seen.is_finite:
                raise fail(STAGE, f"batches, where they reach {node.name},", "finite", "NaN, infinity or no data")
        self._kept: dict[tuple, Any] = {}

    def _watch(self, node: fx.Node, value: Any) -> None:
        if node in self.seen:
            self.seen[node].see(value)

    def of(self, d: Dimension, bits: Bits) -> Grid:
        """Of a tensor that is quantized."""
        key = d.name, bits[d.name]
        if key not in self._kept:
            self._kept[key] = self._activation(d, bits[d.name])
        return self._kept[key]

    def at(self, node: fx.Node, i: int, bits: Bits) -> Grid:
        """Of operand i of a node, which is quantized."""
        return self.of(self.topology.by_edge[node, i], bits)

    def weight(self, layer: fx.Node, bits: Bits) -> Weight:
        """Of a layer: on integers its steps depend on those of what it reads, as the bias must fit into the sums."""
        given, own = (self.topology.by_edge[layer, i] for i in range(2))
        key = own.name, bits[own.name], bits[given.name]
        if key not in self._kept:
            make = self._integers if self.hardware.on_integers else self._codes
            self._kept[key] = make(layer, bits[own.name], bits)
        return self._kept[key]

    def may_wrap(self, layer: fx.Node, bits: Bits) -> bool:
        """Whether the sums of a layer on integers could leave their accumulator, for any input."""
        weight, x = self.weight(layer, bits), self.at(layer, 0, bits)
        largest = weight.codes.double().abs().flatten(1).sum(1) * x.limit
        if weight.bias is not None:
            largest += weight.bias.abs()
        return bool(largest.max() >= 2 ** (self.topology.sum_bits(self.topology.descriptor(layer, bits)) - 1))

    def _activation(self, d: Dimension, bits: int) -> Grid:
        if d.name in self.known:
            step, zero = self.known[d.name]
            return Grid(torch.tensor([step]), torch.tensor([zero], dtype=torch.int32), bits)
        ends = [self._range(self.seen[x]) for x in (d.joined or (d.source,))]
        low, high = (torch.tensor([end]) for end in (min(e[0] for e in ends), max(e[1] for e in ends)))
        searched = self.ranges == "mse" and bits <= 8 and len(ends) == 1
        if searched:
            step, zero = find.mse(self.seen[d.source].sample(), bits, self.hardware.on_integers, low, high)
        elif self.hardware.on_integers:
            step, zero = self._symmetric(torch.maximum(-low, high), bits), torch.zeros(1, dtype=torch.int32)
        else:
            step, zero = find.step_and_zero(low, high, bits)
        return self._grid(step, torch.zeros_like(zero) if self.hardware.on_integers else zero, bits)

    def _range(self, seen: Observer) -> tuple[float, float]:
        """average: of batches, as HAGO's avg_range; else all that was seen."""
        if self.ranges != "average":
            return seen.low, seen.high
        lows, highs = zip(*seen.ends, strict=True)
        return sum(lows) / len(lows), sum(highs) / len(highs)

    def _codes(self, layer: fx.Node, width: int, bits: Bits) -> Weight:
        weight = to_kernel_order(self.topology.weight_of(layer).detach())
        n = weight.shape[0]
        rows = weight.reshape(n if self.hardware.weights == "channel" else 1, -1)
        step, zero = (find.mse if self.ranges == "mse" else find.minmax)(rows, width, width == 8)
        step, zero = (t.expand(n).contiguous() for t in (step, zero))
        return Weight(ops.quantize(weight, step, zero, width), self._grid(step, zero, width))

    def _integers(self, layer: fx.Node, width: int, bits: Bits) -> Weight:
        weight, bias = self.topology.weight_of(layer).detach(), self.topology.bias_of(layer)
        rows = weight.reshape(weight.shape[0] if self.hardware.weights == "channel" else 1, -1)
        step = find.mse(rows, width, True)[0] if self.ranges == "mse" else self._symmetric(rows.abs().amax(1), width)
        x_step = self.at(layer, 0, bits).step
        if bias is not None:
            # A channel of next to no weights must still hold its bias: in a quarter of the sums' range.
            room = 2.0 ** (self.topology.sum_bits(self.topology.descriptor(layer, bits)) - 2)
            least = bias.detach().abs().reshape(len(rows), -1).amax(1) / (room * x_step)
            is_empty = (rows == 0).all(1) & (least > 0)
            step = torch.where(is_empty, least, torch.maximum(step, least))
        grid = self._grid(step, torch.zeros_like(step, dtype=torch.int32), width)
        scaled = weight.reshape(len(rows), -1) * (1 / grid.step[:, None])
        codes = scaled.round().clamp(-grid.limit, grid.limit).to(torch.int8).reshape(weight.shape)
        if bias is not None:
            bias = integers.bias_of(bias, x_step.double() * grid.step.double())
        return Weight(codes, grid, bias)

    def _grid(self, step: Tensor, zero: Tensor, bits: int) -> Grid:
        if self.hardware.scales == "power_of_two":
            step = integers.power_of_two(step)
        return Grid(step, zero, bits)

    @staticmethod
    def _symmetric(largest: Tensor, bits: int) -> Tensor:
        """HAGO: the largest magnitude over 2^(bits - 1); it is itself clipped by one step."""
        step = largest.float() / 2 ** (bits - 1)
        return torch.where(step < find.SMALLEST_STEP, torch.ones_like(step), step)
