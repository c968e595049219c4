"""Latency of a layer at each width, measured inside the network that it runs in, and kept in tables.

A kernel called alone finds its weight in the cache and its input where no neighbour left it. So whole fused networks
run, one for each pair of widths, and the time of every step is taken where it runs, between the same neighbours as in
the end.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qk import _core, machine, timing
from qk.deploy import FusedModel, convert, fuse
from qk.errors import fail
from qk.files import write_json
from qk.inputs import digest, evaluating, feed
from qk.prepare.prepared import Layer
from qk.search.bank import Bank
from qk.search.cost import Costs
from qk.search.items import STAGE, Widths

FORMAT = 1
ROUNDS = 30  # calls of each network that are timed at least, after as many as it takes to warm up
SECONDS = 1.0  # that they are spread over at least: some of what else the machine does goes on for longer than 30 calls
WARM_UP = 3
SHARE = 0.25  # of the calls that took no longer: what else the machine does lengthens some calls, and shortens none
WHERE = ("cpu", "threads", "instruction set", "gpu", "qk")  # of the machine: without these equal, times differ
FEWEST = 3  # rows of a kind from which the time of another size is estimated


def shape_of(layer: Layer, module: nn.Module, size: tuple[int, ...]) -> str:
    """What the time of a layer depends on beside its widths, as text. size: of its input."""
    on, weight = ("x".join(map(str, numbers)) for numbers in (size, layer.weight_shape))
    if layer.kind == "linear":
        return f"linear {weight} on {on}"
    places = (module.stride, module.padding, module.dilation)
    words = [place if isinstance(place, str) else ",".join(map(str, place)) for place in places]
    return f"conv2d {weight} on {on} stride {words[0]} padding {words[1]} dilation {words[2]} groups {module.groups}"


@dataclass
class LatencyTable:
    """Milliseconds by shape and widths ("W4A8"), on one machine with one number of threads.

    work: multiply-accumulates by shape. rest: by network, what a call takes beside its layers, as a share of these at
    their widest.
    """

    machine: dict[str, Any] = field(default_factory=machine.fingerprint)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)

    def holds(self, shape: str, widths: Widths) -> bool:
        return word(widths) in self.times.get(shape, {})

    def time(self, shape: str, widths: Widths, macs: int) -> float:
        """Measured; or, where the table lacks it, estimated from the speed of the rows of its kind nearest in size.

        Raises QkError where too few of these are known.
        """
        if self.holds(shape, widths):
            return self.times[shape][word(widths)]
        kind = kind_of(shape)
        rows = [s for s in self.times if kind_of(s) == kind and self.holds(s, widths)]
        if len(rows) < FEWEST:
            got = f"{len(rows)} of {kind} {word(widths)}, none of {shape}"
            expected = f"one with the layer's time, or {FEWEST} of its kind"
            raise fail(STAGE, "table", expected, got, "Measure this network on that machine.")
        nearest = sorted(rows, key=lambda s: abs(math.log(self.work[s] / macs)))[:FEWEST]
        return macs * statistics.median(self.times[s][word(widths)] / self.work[s] for s in nearest)

    def add(self, shape: str, widths: Widths, macs: int, ms: float) -> None:
        self.times.setdefault(shape, {})[word(widths)] = ms
        self.work[shape] = macs

    def differences(self, other: dict[str, Any]) -> list[str]:
        """In what the machine, its threads or the kernels are not those of another fingerprint."""
        mine = self.machine
        return [f"{key} {mine.get(key)}, here {other.get(key)}" for key in WHERE if mine.get(key) != other.get(key)]

    @property
    def is_foreign(self) -> bool:
        """Whether it is of another machine than this one as it is set now."""
        return bool(self.differences(machine.fingerprint()))

    def save(self, path: str | Path) -> None:
        """As JSON."""
        write_json(path, {"format": FORMAT, **asdict(self)}, STAGE)

    @staticmethod
    def load(path: str | Path, foreign: bool = False) -> LatencyTable:
        """foreign: of another machine, for which widths are to be chosen; else one of another machine is refused.

        Raises QkError for that, and for a file that is no table.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, not {FORMAT}")
            times = {str(s): {str(w): float(ms) for w, ms in row.items()} for s, row in data["times"].items()}
            work = {str(s): int(macs) for s, macs in data["work"].items()}
            rest = {str(network): float(share) for network, share in data["rest"].items()}
            numbers = [*work.values(), *(ms for row in times.values() for ms in row.values())]
            if times.keys() != work.keys() or not all(0 < x < math.inf for x in numbers):
                raise ValueError("rows without a positive time or work")
            table = LatencyTable(dict(data["machine"]), times, work, rest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise fail(STAGE, str(path), "a table of latencies", f"{type(error).__name__}: {error}") from error
        if not foreign and (other := table.differences(machine.fingerprint())):
            advice = "Load it with foreign=True to choose widths for that machine, or measure one here."
            raise fail(STAGE, str(path), "a table of this machine", "; ".join(other), advice)
        return table


def word(widths: Widths) -> str:
    return f"W{widths[0]}A{widths[1]}"


def kind_of(shape: str) -> str:
    """linear, conv2d 1x1, conv2d 3x3 depthwise, ...: what runs on one kernel."""
    words = shape.split()
    if words[0] == "linear":
        return words[0]
    n, per_group, *window = words[1].split("x")
    return f"conv2d {'x'.join(window)}" + (" depthwise" if per_group == "1" and words[-1] == n else "")


# --- timing a fused network -------------------------------------------------------------------------------------------


class _Steps(TorchDispatchMode):
    """Notes what each call of `network` says about the time of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.qk.network.default:
            self.calls.append(_core.step_seconds())
        return found


@contextmanager
def _timed_steps() -> Iterator[_Steps]:
    _core.time_steps(True)
    try:
        with _Steps() as steps:
            yield steps
    finally:
        _core.time_steps(False)


@dataclass(frozen=True)
class NetworkTimes:
    """Milliseconds of a network, lower quartiles. whole: of a call. layers: of the steps that come from each layer."""

    whole: float
    layers: dict[str, float]


def network_times(models: Sequence[FusedModel], inputs: Any) -> list[NetworkTimes]:
    """Of fused models on the same inputs, alternating, so that whatever slows the machine slows all of them."""
    steps: list[list[list[float]]] = [[] for _ in models]  # of each model: of each round: of each step
    whole: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        end = time.perf_counter() + SECONDS
        for round in itertools.count(-WARM_UP):
            if round >= ROUNDS and time.perf_counter() > end:
                break
            for model, kept, times in zip(models, steps, whole, strict=True):
                feed(model, inputs)  # others ran since: its weights go back to where they lie when it runs alone
                took = timing.milliseconds(lambda model=model: feed(model, inputs))
                with _timed_steps() as seen:
                    feed(model, inputs)
                if round >= 0:
                    kept.append([1e3 * second for call in seen.calls for second in call])
                    times.append(took)
    found = []
    for model, kept, times in zip(models, steps, whole, strict=True):
        names = [name for region in model.regions for _, name in region.steps]
        layers: dict[str, float] = defaultdict(float)
        for name, column in zip(names, zip(*kept, strict=True), strict=True):
            layers[name] += timing.quantile(column, SHARE)
        found.append(NetworkTimes(timing.quantile(times, SHARE), dict(layers)))
    return found


def latency_costs(bank: Bank, inputs: Any, table: LatencyTable) -> Costs:
    """Milliseconds of each item at each option on a batch, and of all that a call takes beside the items.

    What a table of this machine lacks is measured and added to it; what one of another machine lacks is estimated from
    its other rows. Raises QkError where it has too few for that, where the model cannot be fused, and where a layer is
    left outside the fused regions, as dynamic ones are.
    """
    p, items = bank.p, bank.items
    sizes = _input_sizes(bank, inputs)
    shapes = {name: shape_of(p.layers[name], p.originals[name], size) for name, size in sizes.items()}
    macs = {name: p.layers[name].macs * sizes[name][0] // p.layers[name].input_shape[0] for name in sizes}
    network = digest(sorted(shapes.items()))
    chosen = [(name, widths) for item in items for name in item.layers for widths in item.options]
    missing = [f"{name} {word(widths)}" for name, widths in chosen if not table.holds(shapes[name], widths)]
    if network not in table.rest:
        missing.append("what is between layers")
    if missing and not table.is_foreign:
        _measure(bank, inputs, table, network, shapes, macs)
        missing = []
    rows = [
        [sum(table.time(shapes[name], widths, macs[name]) for name in item.layers) for widths in item.options]
        for item in items
    ]
    share = table.rest.get(network)
    if share is None:
        if not table.rest:
            raise fail(STAGE, "table", "of at least one network", "of none", "Measure one on that machine.")
        share = statistics.median(table.rest.values())
    return Costs(rows, share * sum(row[0] for row in rows), tuple(missing))


def _measure(
    bank: Bank, inputs: Any, table: LatencyTable, network: str, shapes: dict[str, str], macs: dict[str, int]
) -> None:
    """Adds the network to the table: its items' layers at all their widths, and the rest."""
    networks = uniform_networks(bank, inputs)
    alike: dict[tuple[str, Widths], list[float]] = defaultdict(list)
    rests, widest = [], 0.0
    for pair, found in zip(networks, network_times(list(networks.values()), inputs), strict=True):
        if alone := [name for item in bank.items for name in item.layers if name not in found.layers]:
            expected = "of layers that run in fused regions"
            advice = "Limit size or bit operations, keep these layers, or prepare without dynamic."
            raise fail(STAGE, "a limit on latency", expected, f"{', '.join(alone[:5])} outside of them", advice)
        total = 0.0
        for item in bank.items:
            for name in item.layers:
                total += found.layers[name]
                if pair in item.options:
                    alike[shapes[name], pair].append(found.layers[name])
        rests.append(found.whole - total)
        widest = widest or total
    work = {shapes[name]: macs[name] for name in shapes}
    for (shape, pair), times in alike.items():
        table.add(shape, pair, work[shape], statistics.mean(times))
    table.rest[network] = max(0.0, statistics.median(rests)) / widest


def _input_sizes(bank: Bank, inputs: Any) -> dict[str, tuple[int, ...]]:
    """Of each quantized layer's first input."""
    sizes: dict[str, tuple[int, ...]] = {}

    def sees(name: str) -> Callable:
        return lambda layer, args, kwargs: sizes.setdefault(name, tuple(layer.taken(*args, **kwargs).shape)) and None

    with ExitStack() as stack, evaluating(bank.p.model), bank.p.quantized(set()), torch.no_grad():
        for name, layer in bank.p.quant_layers().items():
            stack.callback(layer.register_forward_pre_hook(sees(name), with_kwargs=True).remove)
        feed(bank.p.model, inputs)
    return sizes


def uniform_networks(bank: Bank, example: Any) -> dict[Widths, FusedModel]:
    """The network fused once for each pair of widths, with all items there that can have it and the others at their
    widest. Raises QkError as fuse does."""
    widths = sorted({option for item in bank.items for option in item.options}, reverse=True)
    found = {}
    for pair in widths:
        bank.put([item.options.index(pair) if pair in item.options else 0 for item in bank.items])
        found[pair] = fuse(convert(bank.p), example)
    return found
