"""The integer network that a device runs: a graph of operators on codes or integers, equal to its simulation in bits.

Where arithmetic is float32 the operators are those of torch.ops.qk, which qk.fuse turns into one program; where it is
integer they are the functions of qk.hago.integers.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from qk import ops
from qk.deploy.fusing import nhwc
from qk.deploy.fusing.graph import CONV2D, DEQUANTIZE, GEMM, QUANTIZE, aten, finished, qk, shape_of
from qk.deploy.fusing.graph import Constants as Tensors
from qk.deploy.fusing.tensors import table_of
from qk.hago import integers
from qk.hago.graph import CONV, LINEAR, argument, conv_arguments, is_flat, sources_of, window_of
from qk.hago.grids import Grid, Grids
from qk.hago.hardware import LAYERS
from qk.hago.topology import Bits, Topology


def realize(topology: Topology, grids: Grids, bits: Bits) -> fx.GraphModule:
    """The network at these bits: float in, float out."""
    kind = _Integers if topology.hardware.on_integers else _Codes
    return kind(topology, grids, bits).run()


class _Writer:
    def __init__(self, topology: Topology, grids: Grids, bits: Bits) -> None:
        self.topology, self.grids, self.bits = topology, grids, bits
        self.hardware = topology.hardware
        source = topology.constants
        self.graph = fx.Graph()
        self.graph.set_codegen(source.graph._codegen)
        self.tensors = Tensors(nn.Module(), self.graph)
        self.source = source
        self.made: dict[fx.Node, Any] = {}  # node of the float graph -> what stands for its float values

    def run(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            kind = self.topology.integer.get(node)
            if node.op in ("get_attr", "call_module"):  # constants are added where they are read
                continue
            if kind is None:
                self.as_it_is(node)
            else:
                self.layer(node) if kind in LAYERS else getattr(self, kind)(node)
        return finished(self.tensors)

    def as_it_is(self, node: fx.Node) -> None:
        """The float operator."""
        self.made[node] = self.graph.node_copy(node, self.plain)
        self.made[node].meta = {"val": node.meta.get("val")} if node.op == "placeholder" else {}

    def plain(self, node: fx.Node) -> fx.Node:
        """The float values of a node."""
        if node.op == "get_attr" and node not in self.made:
            self.made[node] = self.constant("float", self.source.tensor(node))
        return self.made[node]

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def constant(self, kind: str, tensor: Tensor | None) -> fx.Node | None:
        return None if tensor is None else self.tensors.add(kind, tensor.detach())


class _Codes(_Writer):
    """network.qk_rows: name of a prepacked weight of a Linear -> codes, zeros and bits, of which fuse makes another for
    images that it reads as they lie."""

    def run(self) -> fx.GraphModule:
        self.rows: dict[str, tuple[Tensor, Tensor, int]] = {}
        network = super().run()
        network.qk_rows = self.rows
        return network

    def scale(self, grid: Grid) -> tuple[fx.Node, fx.Node]:
        return self.tensors.scalar(grid.step), self.tensors.scalar(grid.zero)

    def codes(self, node: fx.Node, i: int) -> tuple[fx.Node, Grid]:
        """Of an operand, an image in NHWC: kernels read it so, and no permutation is left between two of them."""
        grid, source = self.grids.at(node, i, self.bits), sources_of(node)[i]
        x = self.plain(source)
        if len(shape_of(source)) == 4 and node.target is not LINEAR:
            x = self.call(aten.permute.default, x, nhwc.NHWC)
        return self.call(QUANTIZE, x, *self.scale(grid), grid.bits), grid

    def image(self, node: fx.Node, x: fx.Node) -> fx.Node:
        """A kernel's result as the float network has it. node: that reads or makes it."""
        return self.call(aten.permute.default, x, nhwc.NCHW) if len(shape_of(sources_of(node)[0])) == 4 else x

    def read(self, node: fx.Node, i: int) -> fx.Node:
        if (node, i) not in self.topology.by_edge:
            return self.plain(sources_of(node)[i])
        codes, grid = self.codes(node, i)
        return self.image(node, self.call(DEQUANTIZE, codes, *self.scale(grid)))

    def layer(self, node: fx.Node) -> None:
        x, grid = self.codes(node, 0)
        weight = self.grids.weight(node, self.bits)
        shape, stored = tuple(weight.codes.shape), 4 if weight.grid.bits == 3 else weight.grid.bits
        packed = ops.pack(weight.codes.reshape(shape[0], -1), stored)
        step, zero = self.scale(grid)
        named = {"x_step": step, "x_zero": zero, "x_bits": grid.bits, "bits": stored}
        named |= {"weight_step": self.constant("steps", weight.grid.step)}
        named |= {"bias": self.constant("bias", self.topology.bias_of(node))}
        if node.target is CONV:
            stride, padding, dilation, groups = conv_arguments(node)
            prepacked = ops.prepack(packed, weight.grid.zero, stored, shape, groups)
            named |= {"weight": self.constant("weight", prepacked), "kernel": list(shape[1:3]), "stride": stride}
            named |= {"padding": padding, "dilation": dilation, "groups": groups}
            self.made[node] = self.image(node, self.call(CONV2D, x, **named))
        else:
            named["weight"] = self.constant("weight", ops.prepack(packed, weight.grid.zero, stored, shape))
            self.rows[named["weight"].target] = weight.codes, weight.grid.zero, stored
            self.made[node] = self.call(GEMM, x, **named)

    def add(self, node: fx.Node) -> None:
        self.made[node] = self.call(node.target, self.read(node, 0), self.read(node, 1))

    multiply = add

    def function(self, node: fx.Node) -> None:
        codes, grid = self.codes(node, 0)
        table = self.constant("table", table_of(node, grid.step, grid.zero))
        self.made[node] = self.image(node, self.call(qk.lookup.default, codes, table))

    def relu(self, node: fx.Node) -> None:
        if (node, 0) in self.topology.passed:
            self.as_it_is(node)
        else:
            self.function(node)

    clip = relu

    def avg_pool2d(self, node: fx.Node) -> None:
        codes, grid = self.codes(node, 0)
        step, zero = self.scale(grid)
        y = self.call(qk.pool.default, codes, step, zero, "average", **window_of(node))
        self.made[node] = _shaped(self, node, self.image(node, y))

    def reshape(self, node: fx.Node) -> None:
        self.as_it_is(node)

    concatenate = max_pool2d = reshape


class Held(NamedTuple):
    """Integers: their node, and their step float64 [1] or [channels] along axis."""

    node: fx.Node
    step: Tensor
    axis: int


class _Integers(_Writer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held: dict[fx.Node, Held] = {}

    def plain(self, node: fx.Node) -> fx.Node:
        held = self.held.get(node)
        if held is not None and node not in self.made:
            step = self.constant("step", held.step)
            self.made[node] = self.call(integers.dequantize, held.node, step, held.axis)
        return super().plain(node)

    def keep(self, node: fx.Node, made: fx.Node, step: Tensor, axis: int) -> None:
        self.held[node] = Held(made, step, axis)

    def read(self, node: fx.Node, i: int) -> Held:
        source = sources_of(node)[i]
        if (node, i) not in self.topology.by_edge:
            return self.held[source]
        return self.quantized(source, self.grids.at(node, i, self.bits))

    def quantized(self, source: fx.Node, grid: Grid) -> Held:
        held, step = self.held.get(source), grid.step.double()
        if held is None:
            given = self.plain(source), self.constant("step", grid.step), grid.limit
            return Held(self.call(integers.quantize, *given), step, 1)
        multiplier, shift = integers.fixed_point(held.step / step)
        factors = self.constant("multiplier", multiplier), self.constant("shift", shift)
        rest = held.axis, grid.limit, self.hardware.rounding
        return Held(self.call(integers.requantize, held.node, *factors, *rest), step, 1)

    def sum_bits(self, node: fx.Node) -> int:
        return self.topology.sum_bits(self.topology.descriptor(node, self.bits))

    def layer(self, node: fx.Node) -> None:
        x, weight = self.read(node, 0), self.grids.weight(node, self.bits)
        step = x.step * weight.grid.step.double()
        given = x.node, self.constant("weight", weight.codes), self.constant("bias", weight.bias)
        if node.target is CONV:
            self.keep(node, self.call(integers.conv2d, *given, *conv_arguments(node), self.sum_bits(node)), step, 1)
        else:
            self.keep(node, self.call(integers.linear, *given, self.sum_bits(node)), step, -1)

    def add(self, node: fx.Node) -> None:
        a, b = self.read(node, 0), self.read(node, 1)
        self.keep(node, self.call(integers.add, a.node, b.node, self.sum_bits(node)), a.step, a.axis)

    def relu(self, node: fx.Node) -> None:
        x = self.read(node, 0)
        self.keep(node, self.call(aten.clamp_min.default, x.node, 0), x.step, x.axis)

    def clip(self, node: fx.Node) -> None:
        x = self.read(node, 0)
        self.keep(node, self.call(integers.clip, x.node, self.constant("step", x.step), x.axis), x.step, x.axis)

    def avg_pool2d(self, node: fx.Node) -> None:
        x, window = self.read(node, 0), window_of(node)
        sums = self.call(integers.sum_pool, x.node, **window, bits=self.sum_bits(node))
        self.keep(node, _shaped(self, node, sums), x.step / prod(window["kernel"]), x.axis)

    def concatenate(self, node: fx.Node) -> None:
        parts = [self.read(node, i) for i in range(len(sources_of(node)))]
        made = self.call(aten.cat.default, [p.node for p in parts], argument(node, "dim", 0))
        self.keep(node, made, parts[0].step, parts[0].axis)

    def max_pool2d(self, node: fx.Node) -> None:
        self.moved(node, integers.max_pool)

    def reshape(self, node: fx.Node) -> None:
        self.moved(node, node.target)

    def moved(self, node: fx.Node, function: Any) -> None:
        x = self.read(node, 0)
        rest = fx.node.map_arg(node.args[1:], self.plain)
        self.keep(node, self.graph.call_function(function, (x.node, *rest), dict(node.kwargs)), x.step, x.axis)


def _shaped(writer: _Writer, node: fx.Node, y: fx.Node) -> fx.Node:
    return writer.call(aten.flatten.using_ints, y, 1) if is_flat(node) else y
