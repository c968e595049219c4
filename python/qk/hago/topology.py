"""Which operators are integer on a device, which tensors are quantized for them, and what is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from math import prod

from torch import Tensor, fx

from qk.deploy.fusing.graph import Constants
from qk.errors import fail
from qk.hago.graph import CONV, WEIGHTED, keeps_axis, kind_of, sources_of, window_of
from qk.hago.hardware import LAYERS, WIDE, Descriptor, Hardware, Kind, Type, bits_of
from qk.prepare.plan import INT32_MAX

STAGE = "qk.hago"
WIDTHS = (24, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2)  # that are tried, below the widest
WEIGHT_WIDTHS = (8, 4, 3, 2)  # as they are stored
LONGEST = INT32_MAX // (255 * 128)  # products of codes whose sum stays in int32
KEEPS = ("reshape", "max_pool2d")  # values that are in the input: quantizing before and behind is the same
Bits = Mapping[str, int]  # of each dimension, by its name


@dataclass(frozen=True)
class Dimension:
    """Bits of one tensor. edges: (reader, number of its operand) that quantize it alike; choices: descending.

    source: whose values these are; of a weight, the layer. joined: the sources that share the scale, in a sum or a
    concatenation. is_sum: operands of a sum on integers, which has a bit more than they."""

    name: str
    source: fx.Node
    edges: tuple[tuple[fx.Node, int], ...]
    choices: tuple[int, ...]
    is_weight: bool = False
    joined: tuple[fx.Node, ...] = ()
    is_sum: bool = False


@dataclass
class Topology:
    """integer: node -> kind, of those that compute in integers. reasons: layer -> why it stays in float. passed: edges
    on which sums go on as they are. joins: nodes whose result has the step that their operands were quantized to. axis:
    of the channels, where integers have a step for each. dimensions: activations, each before the weights that it meets
    first."""

    hardware: Hardware
    constants: Constants
    integer: dict[fx.Node, Kind] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    passed: set[tuple[fx.Node, int]] = field(default_factory=set)
    joins: set[fx.Node] = field(default_factory=set)
    axis: dict[fx.Node, int] = field(default_factory=dict)
    dimensions: list[Dimension] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in self.constants.graph.nodes:
            self._sort(node)
            if node in self.integer:
                self._follow(node)
        self._find_dimensions()
        self.by_edge = {edge: d for d in self.dimensions for edge in d.edges}
        for node in self.integer:  # now, not in the middle of a search
            self.descriptor(node, self.widest())

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _sort(self, node: fx.Node) -> None:
        kind = kind_of(node)
        known = kind is not None and kind in self.hardware.operators
        reads = [source in self.integer for source in sources_of(node)] if known else []
        if not known:
            if node.target in WEIGHTED:
                without = f"{self.hardware.name} has no {kind} in integers"
                self.reasons[node] = without if kind else "its weight or bias is computed, or it reads no activation"
        elif kind in LAYERS and not self.hardware.on_integers and self._length(node) > LONGEST:
            self.reasons[node] = f"sums of {self._length(node)} products could leave int32, which holds {LONGEST}"
        elif any(reads) or (self.hardware.operators[kind].begins and kind not in KEEPS):
            self.integer[node] = kind
        elif kind in LAYERS:
            self.reasons[node] = f"nothing that it reads is integer, and {kind} begins none on {self.hardware.name}"

    def _length(self, node: fx.Node) -> int:
        """Products in a sum of a layer."""
        return self.weight_of(node)[0].numel()

    def weight_of(self, node: fx.Node) -> Tensor:
        """Of a layer, as it is in the float network."""
        return self.constants.tensor(node.args[1])

    def bias_of(self, node: fx.Node) -> Tensor | None:
        """Of a layer."""
        bias = node.args[2] if len(node.args) > 2 else None
        return None if bias is None else self.constants.tensor(bias)

    # --- what arrives -----------------------------------------------------------------------------------------------

    def _follow(self, node: fx.Node) -> None:
        """Whether its operands go on as they are, and on which axis its result has steps of channels."""
        kind, sources = self.integer[node], sources_of(node)
        if kind in LAYERS:
            if self.hardware.weights == "channel":
                self.axis[node] = 1 if node.target is CONV else -1
        elif not self.hardware.on_integers:
            self._stay_in_registers(node)
        elif kind == "concatenate":
            self.joins.add(node)
        elif len(sources) == 1 and sources[0] in self.integer:
            self._pass(node, kind, sources[0])

    def _pass(self, node: fx.Node, kind: Kind, source: fx.Node) -> None:
        """Integers into an operator of one operand: it must take their type, and leave steps of channels on an axis."""
        axis, bits = self.axis.get(source), bits_of(self.output_of(source))
        fits = any(bits_of(d.types(1)[0]) >= bits for d in self.hardware.operators[kind].integer)
        stays = axis is None or (kind in ("relu", "clip") or keeps_axis(node, axis))
        if fits and stays and (kind in KEEPS or bits >= WIDE):
            self.passed.add((node, 0))
            if axis is not None:
                self.axis[node] = axis
        elif kind in KEEPS:
            self.joins.add(node)

    def _stay_in_registers(self, node: fx.Node) -> None:
        """A layer's or another result that nobody else reads; a sum takes it from a layer alone, whose epilogue adds
        before it activates. Values that are only moved are quantized by whoever reads them."""
        kind, sources = self.integer[node], sources_of(node)
        if kind in KEEPS or kind == "concatenate":
            self.passed |= {(node, i) for i in range(len(sources))}
            return
        takes = [bits_of(t) for d in self.hardware.operators[kind].integer for t in d.types(len(sources))]
        for i, x in enumerate(sources):
            made = self.integer.get(x)
            if made is None or made in KEEPS or made == "concatenate" or list(x.users) != [node]:
                continue
            alone = len(sources) == 1 or (made in LAYERS and sources.count(x) == 1)
            if alone and max(takes) >= bits_of(self.output_of(x)) >= WIDE:
                self.passed.add((node, i))
                return

    def output_of(self, node: fx.Node) -> Type:
        """The widest type of an integer node's result."""
        kind = self.integer[node]
        if kind in KEEPS and self.hardware.on_integers and (node, 0) in self.passed:
            return self.output_of(sources_of(node)[0])
        return max((d.output for d in self.hardware.operators[kind].integer), key=bits_of)

    # --- dimensions -------------------------------------------------------------------------------------------------

    def root(self, node: fx.Node) -> fx.Node:
        """Whose values these are, behind what only moves them."""
        while self.integer.get(node) in KEEPS and (node, 0) in self.passed:
            node = sources_of(node)[0]
        return node

    def _find_dimensions(self) -> None:
        joined = self._joined()
        found: dict[tuple, dict] = {}
        for node, kind in self.integer.items():
            sources = sources_of(node)
            for i, source in enumerate(sources):
                if (node, i) in self.passed:
                    continue
                alike = range(len(sources)) if node in self.joins else (i,)
                width = min(self._widest(node, j) for j in alike)
                root = self.root(source)
                group = joined.get(root, (root,))
                key: tuple = (group, width >= WIDE)
                if kind == "add" and self.hardware.on_integers:  # operands of a sum have one scale
                    group = tuple(dict.fromkeys(self.root(x) for x in sources))
                    key = ("sum", node)
                entry = found.setdefault(key, {"source": root, "edges": [], "top": width, "joined": group})
                entry["edges"].append((node, i))
                entry["top"] = min(entry["top"], width)
            if kind in LAYERS:
                found["weight", node] = {"source": node, "edges": [(node, 1)], "top": self._widest(node, 1)}
        self.dimensions = [self._dimension(key, **entry) for key, entry in found.items()]
        names = [d.name for d in self.dimensions]
        assert len(set(names)) == len(names)

    def _dimension(
        self,
        key: tuple,
        source: fx.Node,
        edges: list[tuple[fx.Node, int]],
        top: int,
        joined: tuple[fx.Node, ...] = (),
    ) -> Dimension:
        is_weight, is_sum = key[0] == "weight", key[0] == "sum"
        least = self.hardware.least_weight_bits if is_weight else self.hardware.least_activation_bits
        if is_sum:
            top = max(least, top - 1 - self._room(edges[0][0]))
        tried = WEIGHT_WIDTHS if is_weight else (top, *(b for b in WIDTHS if b < top))
        choices = tuple(b for b in tried if least <= b <= top) or (top,)
        name = source.name
        if is_weight:
            name += ".weight"
        elif is_sum or key[1]:  # beside the same tensor's narrower codes for others
            name += f".{edges[0][0].name}"
        return Dimension(name, source, tuple(edges), choices, is_weight, joined, is_sum)

    def _room(self, node: fx.Node) -> int:
        """Bits that averages need of a sum that goes on into them: so many of them are added."""
        found = 0
        for user in node.users:
            if (user, 0) in self.passed and user in self.integer:
                if self.integer[user] == "avg_pool2d":
                    found = max(found, (prod(window_of(user)["kernel"]) - 1).bit_length())
                else:
                    found = max(found, self._room(user))
        return found

    def _joined(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """Root -> the roots that it shares a step with, as they lie side by side in a concatenation."""
        groups: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node, kind in self.integer.items():
            if kind != "concatenate" and node not in self.joins:
                continue
            members = [node, *(self.root(x) for x in sources_of(node))]
            merged = tuple(dict.fromkeys(x for m in members for x in groups.get(m, (m,))))
            for member in merged:
                groups[member] = merged
        return groups

    def _widest(self, node: fx.Node, i: int) -> int:
        """Bits of the widest type that the operand may have when it is quantized."""
        kind, sources = self.integer[node], sources_of(node)
        if not self.hardware.on_integers and (kind not in LAYERS or i == 0):
            return 8  # what is not in registers
        count = 2 if kind in LAYERS else len(sources)
        widest = max(bits_of(d.types(count)[i]) for d in self.hardware.operators[kind].integer)
        if kind in LAYERS or sources[i] not in self.integer:
            return widest
        return min(widest, bits_of(self.output_of(sources[i])))

    # --- descriptors ------------------------------------------------------------------------------------------------

    def widest(self) -> dict[str, int]:
        """The most bits of every dimension."""
        return {d.name: d.choices[0] for d in self.dimensions}

    def groups(self) -> list[tuple[Dimension, ...]]:
        """Every activation with the weights of the layers that read it: what the cost of a layer depends on."""
        found: dict[str, list[Dimension]] = {d.name: [d] for d in self.dimensions if not d.is_weight}
        for node, kind in self.integer.items():
            if kind in LAYERS:
                found[self.by_edge[node, 0].name].append(self.by_edge[node, 1])
        return [tuple(group) for group in found.values()]

    @staticmethod
    def sum_bits(descriptor: Descriptor) -> int:
        """In which sums wrap: the accumulator, and the type in which they leave it."""
        return min(descriptor.accumulator, bits_of(descriptor.output))

    def descriptor(self, node: fx.Node, bits: Bits) -> Descriptor:
        """The first of the node's kind whose types hold the bits."""
        kind, sources = self.integer[node], sources_of(node)
        count = 2 if kind in LAYERS else len(sources)
        wanted = [self._bits_at(node, i, bits) for i in range(count)]
        for descriptor in self.hardware.operators[kind].integer:
            types = descriptor.types(count)
            orders = {types} if kind in LAYERS or count != 2 else set(permutations(types))
            if any(all(bits_of(t) >= b for t, b in zip(order, wanted, strict=True)) for order in orders):
                return descriptor
        got = f"{node.name}, which reads {' and '.join(f'{b} bits' for b in wanted)}"
        advice = "The widest types of its operands must be in one descriptor."
        raise fail(
            STAGE, f"hardware {self.hardware.name}", f"a descriptor of {kind} for all that it reads", got, advice
        )

    def _bits_at(self, node: fx.Node, i: int, bits: Bits) -> int:
        found = self.by_edge.get((node, i))
        if found is not None:
            return bits[found.name] + found.is_sum
        source = sources_of(node)[i]
        only_moves = not self.hardware.on_integers and self.integer[node] in (*KEEPS, "concatenate")
        return 0 if only_moves or source not in self.integer else bits_of(self.output_of(source))
