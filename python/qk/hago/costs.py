"""What a choice of bits costs on a device: declared numbers times work, or times measured here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qk import ops
from qk.deploy.fusing.graph import shape_of
from qk.hago.graph import CONV, conv_arguments, macs_of
from qk.hago.hardware import LAYERS, Descriptor, bits_of
from qk.hago.topology import Bits, Topology
from qk.timing import alternate, quantile


class Costs:
    """Of one sample; batch: how many the example has. Declared: a layer's multiply-accumulates, or a result's values,
    times the descriptor's cost. With "measure": milliseconds of the layer's kernel on codes with the threads of now;
    other operators are part of them."""

    def __init__(self, topology: Topology, batch: int) -> None:
        self.topology, self.batch = topology, batch
        descriptors = [d for operator in topology.hardware.operators.values() for d in operator.integer]
        self.measures = any(d.cost == "measure" for d in descriptors)
        self._measured: dict[tuple, float] = {}
        self._kept: dict[tuple, float] = {}
        self._dimensions: dict[fx.Node, list[str]] = {node: [] for node in topology.integer}
        for (node, _), dimension in topology.by_edge.items():
            self._dimensions[node].append(dimension.name)

    @property
    def unit(self) -> str:
        """Of every cost."""
        return "ms" if self.measures else "operations"

    def of(self, bits: Bits) -> float:
        """Of the whole network."""
        return sum(self.of_node(node, bits) for node in self.topology.integer)

    def of_node(self, node: fx.Node, bits: Bits) -> float:
        """Of one operator."""
        key = (node, *(bits[name] for name in self._dimensions[node]))
        if key not in self._kept:
            self._kept[key] = self._of_node(node, bits)
        return self._kept[key]

    def _of_node(self, node: fx.Node, bits: Bits) -> float:
        kind, descriptor = self.topology.integer[node], self.topology.descriptor(node, bits)
        if descriptor.cost != "measure":
            values = torch.Size(shape_of(node)).numel()
            work = macs_of(node, self.topology.weight_of(node)) if kind in LAYERS else values
            return descriptor.cost * work / self.batch
        key = (
            node.target,
            shape_of(node.args[0]),
            tuple(self.topology.weight_of(node).shape),
            _window(node),
            descriptor,
        )
        if key not in self._measured:
            self._measured[key] = _measured(node, self.topology.weight_of(node), descriptor) / self.batch
        return self._measured[key]


def _window(node: fx.Node) -> tuple:
    return tuple(map(str, conv_arguments(node))) if node.target is CONV else ()


def _measured(node: fx.Node, weight: Tensor, descriptor: Descriptor) -> float:
    """Milliseconds of the kernel, codes to codes."""
    bits = bits_of(descriptor.types(2)[1])
    n, k = weight.shape[0], weight[0].numel()
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=random)
    zero, step = torch.full((n,), 2 ** (bits - 1), dtype=torch.int32), torch.full((n,), 0.01)
    x_step, x_zero = torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32)
    end = {"out_step": torch.tensor([0.1]), "out_zero": torch.tensor([128], dtype=torch.int32)}
    shape = list(shape_of(node.args[0]))
    if node.target is CONV:
        stride, padding, dilation, groups = conv_arguments(node)
        window = {"kernel": list(weight.shape[2:]), "stride": stride, "padding": padding, "dilation": dilation}
        packed = ops.prepack(ops.pack(codes, bits), zero, bits, (n, *weight.shape[2:], weight.shape[1]), groups)
        x = torch.randint(0, 256, (shape[0], *shape[2:], shape[1]), dtype=torch.uint8, generator=random)
        return _ms(lambda: ops.conv2d(x, x_step, x_zero, packed, step, None, bits, groups=groups, **window, **end))
    packed = ops.prepack(ops.pack(codes, bits), zero, bits, (n, k))
    x = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=random)
    return _ms(lambda: ops.gemm(x, x_step, x_zero, packed, step, None, bits, **end))


def _ms(call: Callable[[], object]) -> float:
    """What a quarter of the calls do not exceed: noise only adds."""
    return quantile(alternate([call], 0.05, 5)[0], 0.25)
