"""The network as a device computes it, on real values: every trial of a search is one pass of this.

Where arithmetic is integer, values are float64 multiples of their steps; the integers behind them wrap and round as
on the device. Where it is float32, codes are values of their grids, and sums are exact before their epilogue.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qk import ops
from qk.deploy.fusing import nhwc
from qk.deploy.fusing.running import flat_inputs
from qk.deploy.fusing.tensors import table_of
from qk.hago import integers
from qk.hago.graph import CONV, LINEAR, argument, conv_arguments, is_flat, sources_of, window_of
from qk.hago.grids import Grid, Grids
from qk.hago.hardware import LAYERS
from qk.hago.topology import Bits, Topology


class Value(NamedTuple):
    """Of integers: real values float64, multiples of step float64 [1] or [channels] along axis."""

    real: Tensor
    step: Tensor
    axis: int

    def integers(self) -> Tensor:
        """What the device holds."""
        return (self.real / integers.along(self.step, self.real.dim(), self.axis)).round().to(torch.int64)


def value(x: Tensor, step: Tensor, axis: int = 1) -> Value:
    """Of integers x."""
    step = step.double()
    return Value(x.double() * integers.along(step, x.dim(), axis), step, axis)


class Simulation:
    """Runs batches at any bits."""

    def __init__(self, topology: Topology, grids: Grids) -> None:
        self.topology, self.grids = topology, grids

    @torch.no_grad()
    def run(self, batch: Any, bits: Bits) -> Any:
        """What the network gives for a batch at these bits."""
        kind = _Integers if self.topology.hardware.on_integers else _Codes
        runner = kind(self.topology, self.grids, bits)
        graph = self.topology.constants.graph
        return graph.process_outputs(
            runner.run(*flat_inputs(self.topology.constants, batch), enable_io_processing=False)
        )


class _Runner(fx.Interpreter):
    def __init__(self, topology: Topology, grids: Grids, bits: Bits) -> None:
        super().__init__(topology.constants.root, graph=topology.constants.graph)
        self.topology, self.grids, self.bits = topology, grids, bits
        self.hardware = topology.hardware

    def run_node(self, node: fx.Node) -> Any:
        kind = self.topology.integer.get(node)
        if kind is None:
            return super().run_node(node)
        return self.layer(node) if kind in LAYERS else getattr(self, kind)(node)

    def as_it_is(self, node: fx.Node) -> Any:
        """The float operator."""
        return super().run_node(node)


class _Codes(_Runner):
    """Scaled in float32 before anything leaves the registers."""

    def codes(self, node: fx.Node, i: int) -> tuple[Tensor, Grid]:
        """Of an operand that is quantized."""
        grid = self.grids.at(node, i, self.bits)
        return ops.quantize(self.env[sources_of(node)[i]], grid.step, grid.zero, grid.bits), grid

    def read(self, node: fx.Node, i: int) -> Tensor:
        """What arrives of operand i."""
        if (node, i) not in self.topology.by_edge:
            return self.env[sources_of(node)[i]]
        codes, grid = self.codes(node, i)
        return laid(node, ops.dequantize(codes, grid.step, grid.zero))

    def layer(self, node: fx.Node) -> Tensor:
        (codes, grid), weight = self.codes(node, 0), self.grids.weight(node, self.bits)
        x = codes.double() - grid.zero.double()
        centred = weight.codes.double() - integers.along(weight.grid.zero, weight.codes.dim(), 0).double()
        if node.target is CONV:
            sums, axis = F.conv2d(x, centred.permute(0, 3, 1, 2), None, *conv_arguments(node)), 1
        else:
            sums, axis = F.linear(x, centred), -1
        y = sums.float() * integers.along(grid.step * weight.grid.step, sums.dim(), axis)
        bias = self.topology.bias_of(node)
        return laid(node, y if bias is None else y + integers.along(bias, y.dim(), axis))

    def add(self, node: fx.Node) -> Tensor:
        return self.read(node, 0) + self.read(node, 1)

    def multiply(self, node: fx.Node) -> Tensor:
        return self.read(node, 0) * self.read(node, 1)

    def function(self, node: fx.Node) -> Tensor:
        codes, grid = self.codes(node, 0)
        return laid(node, table_of(node, grid.step, grid.zero)[codes.long()])

    def relu(self, node: fx.Node) -> Tensor:
        return self.as_it_is(node) if (node, 0) in self.topology.passed else self.function(node)

    clip = relu

    def avg_pool2d(self, node: fx.Node) -> Tensor:
        (codes, grid), window = self.codes(node, 0), window_of(node)
        sums = integers.window_sums(codes.double() - grid.zero.double(), **window)
        count = torch.tensor(float(prod(window["kernel"])))
        return _flat(node, laid(node, sums.float() * (grid.step / count)))

    def reshape(self, node: fx.Node) -> Any:
        return self.as_it_is(node)

    concatenate = max_pool2d = reshape


class _Integers(_Runner):
    """Results stay integers with the step of their sums."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.values: dict[fx.Node, Value] = {}

    def run_node(self, node: fx.Node) -> Any:
        made = super().run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            self.values.pop(used, None)
        return made

    def keep(self, node: fx.Node, made: Value) -> Tensor:
        """Remembers the integers; returns what a float operator reads of them."""
        self.values[node] = made
        return made.real.float()

    def read(self, node: fx.Node, i: int) -> Value:
        """What arrives of operand i: requantized, quantized, or the sums themselves."""
        source = sources_of(node)[i]
        if (node, i) not in self.topology.by_edge:
            return self.values[source]
        return self.quantized(source, self.grids.at(node, i, self.bits))

    def quantized(self, source: fx.Node, grid: Grid) -> Value:
        made = self.values.get(source)
        if made is None:
            return value(integers.quantize(self.env[source], grid.step, grid.limit), grid.step)
        factors = integers.fixed_point(made.step / grid.step.double())
        x = integers.requantize(made.integers(), *factors, made.axis, grid.limit, self.hardware.rounding)
        return value(x, grid.step)

    def wrapped(self, node: fx.Node, real: Tensor, step: Tensor, axis: int) -> Value:
        """Sums as the accumulator and then the result's type hold them."""
        bits = self.topology.sum_bits(self.topology.descriptor(node, self.bits))
        return value(integers.wrap(Value(real, step, axis).integers(), bits), step, axis)

    def layer(self, node: fx.Node) -> Tensor:
        x, weight = self.read(node, 0), self.grids.weight(node, self.bits)
        real = weight.codes.double() * integers.along(weight.grid.step.double(), weight.codes.dim(), 0)
        step = x.step * weight.grid.step.double()
        if node.target is CONV:
            y, axis = F.conv2d(x.real, real, None, *conv_arguments(node)), 1
        else:
            y, axis = F.linear(x.real, real), -1
        if weight.bias is not None:
            y = y + integers.along(weight.bias * step, y.dim(), axis)
        return self.keep(node, self.wrapped(node, y, step, axis))

    def add(self, node: fx.Node) -> Tensor:
        a, b = self.read(node, 0), self.read(node, 1)
        return self.keep(node, self.wrapped(node, a.real + b.real, a.step, a.axis))

    def relu(self, node: fx.Node) -> Tensor:
        x = self.read(node, 0)
        return self.keep(node, x._replace(real=x.real.clamp(min=0)))

    def clip(self, node: fx.Node) -> Tensor:
        x = self.read(node, 0)
        return self.keep(node, value(integers.clip(x.integers(), x.step, x.axis), x.step, x.axis))

    def avg_pool2d(self, node: fx.Node) -> Tensor:
        x, window = self.read(node, 0), window_of(node)
        sums = self.wrapped(node, integers.window_sums(x.real, **window), x.step, x.axis)
        made = value(sums.integers(), x.step / prod(window["kernel"]), x.axis)
        return self.keep(node, made._replace(real=_flat(node, made.real)))

    def concatenate(self, node: fx.Node) -> Tensor:
        parts = [self.read(node, i) for i in range(len(sources_of(node)))]
        axis = argument(node, "dim", 0)
        return self.keep(node, parts[0]._replace(real=torch.cat([p.real for p in parts], axis)))

    def reshape(self, node: fx.Node) -> Tensor:
        x = self.read(node, 0)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return self.keep(node, x._replace(real=node.target(x.real, *args[1:], **kwargs)))

    max_pool2d = reshape


def laid(node: fx.Node, y: Tensor) -> Tensor:
    """An image as kernels leave it, NHWC in memory: float operators behind it add in that order."""
    is_image = y.dim() == 4 and node.target is not LINEAR
    return y.permute(nhwc.NHWC).contiguous().permute(nhwc.NCHW) if is_image else y


def _flat(node: fx.Node, y: Tensor) -> Tensor:
    return y.flatten(1) if is_flat(node) else y
