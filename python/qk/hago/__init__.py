"""HAGO: which tensors of a network are integer on a device, at how many bits, and the integer network that it runs.

Source: Jiang et al., Automated Backend-Aware Post-Training Quantization (2021); docs/hago.md has the differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, fx, nn

from qk.calibrate.batches import hold
from qk.calibrate.objective import first_tensor, task_loss
from qk.deploy.convert import fingerprint
from qk.deploy.fuse import FusedModel, check_inputs, fuse_network, kinds
from qk.errors import fail
from qk.fields import STRICT, parsed, refuses_in_words
from qk.files import write_json
from qk.hago.costs import Costs
from qk.hago.graph import float_graph
from qk.hago.grids import Grids, Ranges
from qk.hago.hardware import LAYERS, Hardware
from qk.hago.realize import realize
from qk.hago.simulate import Simulation
from qk.hago.topology import STAGE, Bits, Topology
from qk.hago.tuners import TUNERS, Trials, Tuner
from qk.inputs import describe, device_of, feed, tensors_in
from qk.inputs import digest as digest_of
from qk.machine import qk_version
from qk.prepare import prepare
from qk.prepare.apply import put
from qk.spec import Recipe
from qk.tables import Table

__all__ = ["Found", "Hardware", "Strategy", "hago"]


@refuses_in_words
@checked_dataclass(frozen=True, config=STRICT)
class Strategy:
    """What was found for one model on one device. bits: of each tensor that is quantized. steps: of each activation,
    step and zero. ranges: by which steps of weights are found. hardware, model: digests, of the graph too. loss, cost,
    unit: of the trial that was best."""

    name: str
    hardware: str
    model: str
    qk: str
    bits: dict[str, int]
    steps: dict[str, tuple[float, int]]
    ranges: Ranges
    loss: float
    cost: float
    unit: str

    def save(self, path: str | Path) -> Path:
        """As a JSON file, which `load` reads."""
        return write_json(path, TypeAdapter(Strategy).dump_python(self, mode="json"), STAGE)

    @staticmethod
    def load(path: str | Path) -> Strategy:
        """Raises QkError for a file that holds none."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise fail(STAGE, str(path), "a JSON file with a strategy", error) from error
        return parsed(Strategy, data, f"strategy {path}")


@dataclass
class Found:
    """model: the integer network, float in and out. fused: the same bits in one program, where the device's arithmetic
    is that of torch.ops.qk; else None. simulate: batch -> what the network gives, computed on real values. history:
    (loss, cost) of every trial."""

    strategy: Strategy
    hardware: Hardware
    model: fx.GraphModule
    fused: FusedModel | None
    simulate: Callable[[Any], Any]
    topology: Topology = field(repr=False)
    grids: Grids = field(repr=False)
    history: list[tuple[float, float]] = field(repr=False)

    def table(self) -> Table:
        """Every operator that the device could compute in integers, with its types, bits, or why it is in float."""
        t, bits = self.topology, self.strategy.bits
        table = Table(
            f"{len(t.integer)} integer operators on {self.hardware.name}", ["operator", "kind", "inputs", "bits"]
        )
        for node, kind in t.integer.items():
            types = t.descriptor(node, bits).inputs
            given = [
                bits[d.name] for (reader, _), d in sorted(t.by_edge.items(), key=lambda e: e[0][1]) if reader is node
            ]
            words = types if isinstance(types, str) else ", ".join(types)
            if kind in LAYERS and self.hardware.on_integers and self.grids.may_wrap(node, bits):
                words += ", sums may wrap"
            table.rows.append([node.name, kind, words, " x ".join(map(str, given)) or "as they come"])
        table.rows += [[node.name, "float", reason, ""] for node, reason in t.reasons.items()]
        return table


def hago(
    model: nn.Module,
    batches: Iterable,
    hardware: Hardware | str | Path,
    *,
    tuner: Tuner = "greedy",
    limit: float | None = None,
    lose: float = 0.0,
    evaluate: Callable[[Callable[[Any], Any]], float] | None = None,
    ranges: Ranges = "mse",
    trials: int | None = None,
    seed: int = 0,
    strategy: Strategy | str | Path | None = None,
    memory_mb: int = 1024,
) -> Found:
    """Quantizes a network as a device declares it: operators that have an integer form there join regions, tensors that
    these read are quantized, and a search gives each its bits.

    model: float32, on the CPU; it is not changed. batches: calibration data, without labels. hardware: a device, the
    name of one that is shipped (`Hardware.shipped()`), or a file. tuner: "greedy" (HAGO's), "random", "annealing",
    "exact" (losses taken to add up), or "default", the widest everywhere. limit: part of the cost at the widest that
    may be used. lose: for greedy, by how much the loss may exceed that of the widest. evaluate: of a function batch ->
    output of the network, larger is better, such as accuracy on labels; without it the loss is the divergence from the
    float model's output on the batches. ranges: how tensors are clipped (qk.hago.grids). trials: of the tuners random
    and annealing. strategy: one that was found before: nothing is searched, and ranges are its own.
    The simulation and `model` of the result are equal bit for bit.
    Raises QkError for a device that has a fault, a limit below the least that it can, a strategy of another model or
    device, and as qk.prepare and qk.fuse do.
    """
    device = hardware if isinstance(hardware, Hardware) else Hardware.load(hardware)
    _check(tuner, limit, lose)
    held = hold(batches, STAGE, None, memory_mb)
    if device_of(model).type != "cpu":
        raise fail(STAGE, "model", "on the CPU", f"on {device_of(model)}", "Devices are simulated there.")
    for i, batch in enumerate(held):
        if kinds(batch) != kinds(held[0]):
            raise fail(STAGE, f"batch {i}", f"like the first, {describe(held[0])}", describe(batch))
    folded, weights = _folded(model, held[0])
    topology = Topology(device, float_graph(folded, held[0], "depthwise_conv2d" in device.operators))
    digest = digest_of([("weights", weights), ("graph", str(topology.constants.graph))])
    known = Strategy.load(strategy) if isinstance(strategy, (str, Path)) else strategy
    if known is not None:
        _check_known(known, device, digest, topology)
    grids = Grids(topology, held, ranges if known is None else known.ranges, {} if known is None else known.steps)
    simulation, costs = Simulation(topology, grids), Costs(topology, next(tensors_in(held[0])).shape[0])
    history: list[tuple[float, float]] = []
    if known is None:
        most = None if limit is None else limit * costs.of(topology.widest())
        measure = _divergence(folded, held, simulation) if evaluate is None else _judged(evaluate, simulation)
        search = Trials(topology.groups(), measure, costs.of, most)
        bits = TUNERS[tuner](search, lose=lose, count=trials, seed=seed) if topology.dimensions else {}
        steps = {d.name: grids.of(d, bits) for d in topology.dimensions if not d.is_weight}
        known = Strategy(
            name=device.name,
            hardware=device.digest,
            model=digest,
            qk=qk_version(),
            bits=bits,
            steps={name: (float(grid.step), int(grid.zero)) for name, grid in steps.items()},
            ranges=ranges,
            loss=search.loss(bits),
            cost=costs.of(bits),
            unit=costs.unit,
        )
        history = search.history
    network = realize(topology, grids, known.bits)
    is_ours = not device.on_integers and bool(topology.integer)
    fused = fuse_network(network, held[0], network.qk_rows) if is_ours else None
    check_inputs(network, network.graph)
    network.recompile()
    bits = known.bits
    return Found(known, device, network, fused, lambda batch: simulation.run(batch, bits), topology, grids, history)


def _check(tuner: Any, limit: float | None, lose: float) -> None:
    if tuner not in TUNERS:
        raise fail(STAGE, "tuner", f"one of {', '.join(TUNERS)}", repr(tuner))
    if limit is not None and not 0 < limit <= 1:
        raise fail(STAGE, "limit", "a share of the cost at the widest, above 0 and up to 1", limit)
    if not lose >= 0:
        raise fail(STAGE, "lose", "0 or more", lose)


def _check_known(known: Strategy, device: Hardware, digest: str, topology: Topology) -> None:
    if known.hardware != device.digest:
        raise fail(STAGE, "strategy", f"one for {device.name} as it is now", f"one for {known.name}, or as it was")
    wanted = {d.name: d.choices for d in topology.dimensions}
    fits = known.bits.keys() == wanted.keys() and all(b in wanted[name] for name, b in known.bits.items())
    if known.model != digest or not fits:
        got = "of another model, or of inputs of another size"
        raise fail(STAGE, "strategy", "one of this model", got, "Search again, without strategy.")
    top = {d.name: 2 ** known.bits[d.name] - 1 for d in topology.dimensions if not d.is_weight}
    good = known.steps.keys() == top.keys() and all(
        0 < step < float("inf") and 0 <= zero <= (0 if device.on_integers else top[name])
        for name, (step, zero) in known.steps.items()
    )
    if not good:
        raise fail(
            STAGE, "strategy", "one with a step above 0 and a zero within the codes for each tensor", known.steps
        )


def _folded(model: nn.Module, example: Any) -> tuple[nn.Module, str]:
    """A copy with BatchNorm folded, in eval mode, and the digest of its weights."""
    p = prepare(model, example, Recipe(weights=8, first_last=None))
    digest = fingerprint(p.model)
    for name, layer in p.originals.items():
        put(p, name, layer)
    return p.model.eval(), digest


def _divergence(model: nn.Module, batches: list, simulation: Simulation) -> Callable[[Bits], float]:
    with torch.no_grad():
        expected = [first_tensor(feed(model, batch), STAGE) for batch in batches]
    samples = sum(len(x) for x in expected)

    def loss(bits: Bits) -> float:
        found = (first_tensor(simulation.run(batch, bits), STAGE) for batch in batches)
        return sum(float(task_loss(y, x, b)) for y, x, b in zip(found, expected, batches, strict=True)) / samples

    return loss


def _judged(evaluate: Callable[[Callable[[Any], Tensor]], float], simulation: Simulation) -> Callable[[Bits], float]:
    return lambda bits: -float(evaluate(lambda batch: simulation.run(batch, bits)))
