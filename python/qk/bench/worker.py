"""The process that measures: one number of threads, one instruction set, a line of JSON for each row as it is done.

Apart from the command that started it, because threads, memory and instruction sets are fixed when libraries load, and
because a peer that crashes takes its process along.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qk import machine
from qk.bench import limits, peers
from qk.bench.harness import alternate
from qk.bench.rows import Candidate, Row
from qk.bench.suite import Wanted, rows

ROUNDS, SLOW_ROUNDS = 9, 3
SLOW = 3.0  # times the fastest of the family: such a candidate is measured in few rounds,
HOPELESS, LONG = 6.0, 0.02  # and one so many times slower than the fastest of all, with so many seconds, in none
SLOT = 0.004  # seconds of one candidate in one round
SMALL_SIZES = (2**14, 2**18)


def main(spec: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    wanted = Wanted(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec["wanted"].items()})
    with out.open("a") as file:

        def tell(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        wanted_rows = [row for row in rows(wanted) if row.name not in spec["skip"]]
        if spec["prepare"]:
            for row in wanted_rows:
                if row.kind == "network":
                    tell(begin=row.name)
                    _, failed = build(row, spec["threads"])
                    tell(prepared=row.name, failed=failed)
            return
        known = limits.measure(spec["threads"], SMALL_SIZES if wanted.small else limits.SIZES)
        found, missing = peers.installed() if wanted.peers else ({}, {})
        tell(machine=machine.fingerprint(), limits=known, peers=peers.versions() if found else {}, missing=missing)
        end = time.perf_counter() + spec["seconds"]
        while wanted_rows:
            left = end - time.perf_counter()
            share = left / len(wanted_rows)
            row = wanted_rows.pop(0)  # its data go with it
            if left <= 0:
                tell(row=_facts(row) | {"entries": [], "failed": {"": "left out: the time was up"}})
                continue
            tell(begin=row.name)
            tell(row=measure(row, spec["threads"], known, share))
            del row
            gc.collect()


def build(row: Row, threads: int) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates of all sources, and what failed. Those that a source made before it failed stay."""
    made: list[Candidate] = []
    failed: dict[str, str] = {}
    for name, source in row.sources.items():
        try:
            for candidate in source(threads):
                made.append(candidate)
        except Exception as error:  # whatever it is: the other candidates are measured
            failed[name] = _words(error)
    return made, failed


def measure(row: Row, threads: int, known: dict[str, Any], budget: float) -> dict[str, Any]:
    """Checks every candidate, then times those that are right in turns."""
    begin = time.perf_counter()
    made, failed = build(row, threads)
    built = time.perf_counter()
    right: dict[str, Candidate] = {}
    for candidate in made:
        try:
            candidate.check()
            right[candidate.name] = candidate
        except Exception as error:
            failed[candidate.name] = _words(error)
    checked = time.perf_counter()
    times = _times(right, budget - (checked - begin), _rest if threads > 1 else lambda before, after: 0.0)
    entries = [_entry(row, c, times[name], known) for name, c in right.items()]
    spent = {"build": built - begin, "check": checked - built, "time": time.perf_counter() - checked}
    spent = {what: round(seconds, 2) for what, seconds in spent.items()}
    return _facts(row) | {"entries": entries, "failed": failed, "seconds": spent}


def _rest(before: str, after: str) -> float:
    """Threads wait for more work by spinning: ONNX Runtime's tens of milliseconds, libgomp's (of ours, torch, zentorch)
    some. Who comes next and has threads of its own would have to share the cores with them."""
    if before.startswith("ORT"):
        return 0.05
    own_threads = ("ORT", "OpenVINO")
    return 0.015 if after.startswith(own_threads) and not before.startswith(own_threads) else 0.0


def _times(right: dict[str, Candidate], budget: float, rest: Callable[[str, str], float]) -> dict[str, list[float]]:
    """Seconds of each, sorted: the fast ones in turns, the others in fewer."""
    times = {name: sorted(_seconds(c) for _ in range(2)) for name, c in right.items()}
    took = {name: t[0] for name, t in times.items()}
    fastest: dict[str, float] = {}
    for name, c in right.items():
        fastest[c.family] = min(took[name], fastest.get(c.family, took[name]))
    kept = [n for n in right if took[n] <= max(HOPELESS * min(took.values()), LONG)]
    slow = [n for n in kept if took[n] > SLOW * fastest[right[n].family]]
    fast = {n: right[n].run for n in kept if n not in slow}
    times |= alternate(fast, ROUNDS, slot=SLOT, budget=budget, took=took, rest=rest)
    times |= alternate({n: right[n].run for n in slow}, SLOW_ROUNDS, slot=0.0, took=took, rest=rest)
    return times


def _facts(row: Row) -> dict[str, Any]:
    return {"kind": row.kind, "name": row.name, "operations": row.operations, "facts": row.facts}


def _entry(row: Row, c: Candidate, times: list[float], known: dict[str, Any]) -> dict[str, Any]:
    """ms: 10 %, 50 % and 90 % of the times. limit_ms: the least time on this machine, vnni_limit_ms: without AMX."""
    entry: dict[str, Any] = {"name": c.name, "ours": c.is_ours, "family": c.family, **c.facts}
    entry["ms"] = [1e3 * t for t in (times[len(times) // 10], median(times), times[-1 - len(times) // 10])]
    if c.is_ours and (c.moved or row.operations):
        entry["moved"] = c.moved
        entry["limit_ms"] = 1e3 * limits.seconds(known, row.operations, c.moved)
        entry["vnni_limit_ms"] = 1e3 * limits.seconds(known, row.operations, c.moved, "avx512vnni")
    return entry


def _seconds(candidate: Candidate) -> float:
    begin = time.perf_counter()
    candidate.run()
    return time.perf_counter() - begin


def _words(error: Exception) -> str:
    """The first line of an error; the whole of it goes to the log."""
    traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
