"""What every benchmark shares: check first, alternate with the peers, print the spread and the share of the limit.

A benchmark makes cases and hands them to `main`; each case says how to check itself, what runs, and what it must move.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from qk import _native
from qk.machine import fingerprint

LONG = 0.02  # seconds after which it does not matter what the caches held before

Run = Callable[[], object]
Clock = Callable[[], float]

# glibc gives a large result back to the system and pays its page faults again at every call; these keep it.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclass
class Case:
    """One row of the table.

    name: with the size, and the layer that the shape comes from. check: raises if ours is wrong; runs before timing.
    ours and peers take no argument. moved_bytes: what ours must read and write; the limit is then the time in which
    torch copies as many bytes in the same rounds. limit: a run that is the limit itself, where that is not a copy.
    operations: of one run, for GOP/s.
    """

    name: str
    check: Run
    ours: Run
    peers: dict[str, Run] = field(default_factory=dict)
    moved_bytes: int = 0
    limit: Run | None = None
    operations: int = 0


def options(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes; a benchmark may add its own and pass the parser to `main`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="", help="instruction set of ours; the best there is without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--compile", action="store_true", help="torch.compile as a peer, where a benchmark has it")
    parser.add_argument("--keep-memory", action="store_true", help="restart with a malloc that reuses large results")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for one thread on a busy machine")
    parser.add_argument("--json", type=Path, default=None)
    return parser


def main(
    name: str, make: Callable[[argparse.Namespace], Iterable[Case]], parser: argparse.ArgumentParser | None = None
):
    args = (parser or options(f"Times {name}.")).parse_args()
    if args.keep_memory and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(args.threads)
    _native.force_isa(args.isa)
    facts = machine(args)
    print(f"{name} on " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = [measure(case, args) for case in make(args) if args.only in case.name]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"benchmark": name, "machine": facts, "cases": rows}, indent=1) + "\n")


def machine(args: argparse.Namespace) -> dict[str, object]:
    """The fingerprint that a figure is worth nothing without."""
    return fingerprint() | {
        "clock": "processor time" if args.cpu_time else "wall",
        "memory": "reused" if os.environ.get("MALLOC_MMAP_THRESHOLD_") else "fresh",
    }


def measure(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Times a case after it has checked itself; prints its lines."""
    case.check()
    runs = {"ours": case.ours, **case.peers}
    if case.limit or case.moved_bytes:
        runs["limit"] = case.limit or copy_of(case.moved_bytes, args.device)
    times = alternate(runs, args.rounds, args.device, clock=time.process_time if args.cpu_time else time.perf_counter)
    middle = {name: median(t) for name, t in times.items()}
    spread = {name: (t[len(t) // 10], t[-1 - len(t) // 10]) for name, t in times.items()}  # p10 to p90
    print(f"\n{case.name}")
    for name, (low, high) in spread.items():
        notes = [f"{middle[name] / middle['ours']:6.2f} x ours"] if name != "ours" else []
        if name == "ours" and "limit" in middle:
            notes.append(f"{100 * middle['limit'] / middle['ours']:.0f} % of the limit")
        if name == "ours" and case.moved_bytes:
            notes.append(f"{case.moved_bytes / middle['ours'] / 1e9:.1f} GB/s")
        if case.operations and name != "limit":
            notes.append(f"{case.operations / middle[name] / 1e9:.1f} GOP/s")
        print(f"  {name:34s}{1e3 * middle[name]:10.4f} ms ({1e3 * low:.4f}-{1e3 * high:.4f})  " + ", ".join(notes))
    return {
        "name": case.name,
        "moved_bytes": case.moved_bytes,
        "operations": case.operations,
        "ms": {
            name: [1e3 * t[len(t) // 10], 1e3 * middle[name], 1e3 * t[-1 - len(t) // 10]] for name, t in times.items()
        },
        "ratio": {name: value / middle["ours"] for name, value in middle.items() if name != "ours"},
    }


def alternate(
    runs: dict[str, Run],
    rounds: int,
    device: str = "cpu",
    slot: float = 0.01,
    clock: Clock = time.perf_counter,
    budget: float = math.inf,
    took: dict[str, float] | None = None,
    rest: Callable[[str, str], float] = lambda before, after: 0.0,
) -> dict[str, list[float]]:
    """Seconds of a run, sorted: every round gives each of them a slot, so a busy neighbour meets all alike.

    budget: seconds after which no further round begins, once there are three. took: seconds of each, where all of them
    ran before. rest: seconds to wait between the slots of two, by their names.
    """

    def seconds(run: Run, repeats: int) -> float:
        begin = clock()
        for _ in range(repeats):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - begin) / repeats

    if took is None:
        for run in runs.values():
            seconds(run, 2)  # compiles, packs, fills caches
        took = {name: seconds(run, 1) for name, run in runs.items()}
    repeats = {name: max(1, round(slot / max(took[name], 1e-7))) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, before = time.perf_counter() + budget, next(reversed(runs), "")
    gc.disable()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            if pause := rest(before, name):
                time.sleep(pause)
            before = name
            if took[name] < LONG:
                run()  # the slot before left its own data in the caches
            times[name].append(seconds(run, repeats[name]))
    gc.enable()
    return {name: sorted(t) for name, t in times.items()}


def copy_of(moved_bytes: int, device: str) -> Run:
    """A copy that reads and writes moved_bytes in total."""
    source = torch.ones(max(1, moved_bytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def forward_backward(function: Callable[..., torch.Tensor], *leaves: torch.Tensor, grad: torch.Tensor) -> Run:
    """A training step of function(*leaves): its value and the gradients of the leaves that ask for one."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted, grad)
