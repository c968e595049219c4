"""The rows of `qk bench kernels`, `qk bench model` and `qk bench peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from qk import ops
from qk.bench import elementwise, ours, problems, training
from qk.bench.harness import Case
from qk.bench.networks import DEFAULT, WIDTHS, Network, start
from qk.bench.networks import ours as our_networks
from qk.bench.peers import installed
from qk.bench.rows import Candidate, Row, Source

SUITES = ("kernels", "model", "peers")


@dataclass(frozen=True)
class Wanted:
    """What a worker measures; travels as JSON."""

    suite: str
    only: str = ""
    small: bool = False
    peers: bool = True
    networks: tuple[str, ...] = DEFAULT
    widths: tuple[str, ...] = WIDTHS
    batches: tuple[int, ...] = (1, 8)
    size: int | None = None
    cache: str = ""
    products_only: bool = False


PRODUCTS = ("gemm", "conv2d", "network")  # what the use of AMX changes


def rows(wanted: Wanted) -> list[Row]:
    """In the order in which they are measured; the networks first, for their goals are what the rest is for."""
    found = installed()[0] if wanted.peers else {}
    made: list[Row] = []
    if wanted.suite in ("model", "peers") and not (wanted.small and wanted.suite == "peers"):
        made += _networks(wanted, found)
    if wanted.suite in ("kernels", "peers"):
        known = found if wanted.suite == "peers" else {k: v for k, v in found.items() if k == "torch"}
        made += _layers(wanted, known)
        made += [_case_row(*item) for item in _cases(wanted)]
    kinds = PRODUCTS if wanted.products_only else {row.kind for row in made}
    return [row for row in made if row.kind in kinds and (wanted.only in row.name or wanted.only in row.kind)]


def _layers(wanted: Wanted, found: dict[str, ModuleType]) -> list[Row]:
    small = wanted.small
    made = []
    for p in problems.SMALL_GEMMS if small else problems.GEMMS:
        sources = _sources("gemm", ours.gemm, p, found)
        made.append(Row("gemm", f"gemm {p.title}", sources, p.operations, {"m": p.m, "k": p.k, "n": p.n}))
    for c in problems.SMALL_CONVS if small else problems.CONVS:
        facts = {"kernel": c.kernel, "stride": c.stride, "groups": c.groups, "channels": c.channels}
        made.append(Row("conv2d", f"conv2d {c.title}", _sources("conv", ours.conv, c, found), c.operations, facts))
    if hasattr(ops, "embedding_bag"):
        for b in problems.SMALL_BAGS if small else problems.BAGS:
            made.append(Row("embedding_bag", f"embedding_bag {b.title}", _sources("bag", elementwise.bag, b, found)))
    return made


def _sources(what: str, mine: Callable, problem: Any, found: dict[str, ModuleType]) -> dict[str, Source]:
    """Ours and each peer's that can do such work, on data that they share and that go with them."""
    problem = replace(problem)
    theirs = {name: partial(getattr(module, what), problem) for name, module in found.items() if hasattr(module, what)}
    return {"qk": partial(mine, problem), **theirs}


def _networks(wanted: Wanted, found: dict[str, ModuleType]) -> list[Row]:
    made, cache = [], Path(wanted.cache)
    for source in wanted.networks:
        for batch in wanted.batches:
            net = Network(source, batch, wanted.size)
            sources: dict[str, Source] = {"qk": lambda _threads, net=net: _our(net, wanted, cache)}
            for name, module in found.items():
                if hasattr(module, "network"):
                    sources[name] = lambda threads, net=net, module=module: module.network(net, threads, cache)
            facts = {"network": net.name, "batch": batch}
            made.append(Row("network", f"network {net.name} batch {batch}, {net.size}", sources, 0, facts))
        loading = {"qk": lambda _threads, source=source: start(source, wanted.widths[0], cache)}
        made.append(Row("start", f"start {Network(source, 1).name}", loading, 0, {"network": Network(source, 1).name}))
    return made


def _our(net: Network, wanted: Wanted, cache: Path) -> Iterable[Candidate]:
    return our_networks(net, wanted.widths, cache, modules=wanted.suite == "model")


def _cases(wanted: Wanted) -> Iterable[tuple[str, str, Callable[[], Case]]]:
    """Kind, name and maker of the rows that have no peers but torch."""
    if wanted.small:
        yield "elementwise", "quantize 4k", partial(elementwise.quantize, 4096)
        yield "training", "lsq small", partial(training.lsq, 32, 32, 1)
        return
    yield from elementwise.cases()
    for shape in training.LSQ_SHAPES:
        per = "per tensor" if shape[2] == 1 else "per row"
        yield "training", f"lsq {shape[0] * shape[1] >> 20}M {per}", partial(training.lsq, *shape, compiled=True)
    for name in ("1M", "16M"):
        shape = training.SOFT_ROUND_SHAPES[name]
        yield "training", f"soft_round {name}", partial(training.soft_round, name, shape, compiled=True)
        yield "training", f"fisher_loss {name}", partial(training.fisher_loss, name, shape, compiled=True)


def _case_row(kind: str, name: str, make: Callable[[], Case]) -> Row:
    """A case of the benchmark scripts as a row."""

    def source(_threads: int) -> Iterable[Candidate]:
        case = make()
        yield Candidate("qk", "ours", case.ours, case.check, case.moved_bytes)
        for peer, run in case.peers.items():
            yield Candidate(peer, peer, run, lambda: None)

    return Row(kind, name, {"qk": source})
