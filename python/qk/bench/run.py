"""Starts the processes that measure, one after the other, and collects what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qk.bench import confine
from qk.bench.harness import KEEP_MEMORY
from qk.bench.suite import Wanted

ROW_SECONDS, PREPARE_SECONDS = 180.0, 900.0  # without a word for so long, a process hangs
ISA_OF = {"none": "", "vnni": "avx512vnni"}
Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


def benchmark(
    wanted: Wanted,
    threads: tuple[int, ...],
    confinements: tuple[str, ...],
    seconds: float,
    say: Say,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """All runs: every number of threads in every confinement. seconds: for measuring, in all of them together; making
    files of networks comes before, takes minutes the first time and is kept in the cache. keep: takes the result as it
    grows, after every row, so that an interrupted benchmark loses none."""
    if wanted.suite != "kernels":
        say("preparing networks")
        prepared: dict[str, Any] = {"threads": 1, "confine": "none"}
        _process(wanted, prepared, 0.0, say, prepare=True)
        for row in prepared["failed"]:
            say(f"  {row}")
    result: dict[str, Any] = {"benchmark": wanted.suite, "small": wanted.small, "runs": []}
    end = time.monotonic() + seconds
    todo = [(confinement, n) for confinement in confinements for n in threads]
    for i, (confinement, n) in enumerate(todo):
        say(f"\n{n} thread{'s' * (n > 1)}{', without AMX' * (confinement == 'vnni')}")
        again = confinement != "none" and "none" in confinements  # of what AMX has no part in
        part = replace(wanted, products_only=again)
        share = max(1.0, (end - time.monotonic()) / (len(todo) - i))
        run: dict[str, Any] = {"threads": n, "confine": confinement, "products_only": part.products_only}
        result["runs"].append(run)

        def measured(text: str) -> None:
            say(text)
            keep(result)

        _process(part, run, share, measured)
    return result


def _process(wanted: Wanted, run: dict[str, Any], seconds: float, say: Say, prepare: bool = False) -> None:
    """Fills one run. A process that dies is started again behind the row that it died in."""
    run |= {"rows": [], "failed": []}
    begin = time.monotonic()
    skip: list[str] = []
    while True:
        spec = {
            "wanted": asdict(wanted),
            "threads": run["threads"],
            "seconds": max(1.0, seconds - (time.monotonic() - begin)),
            "prepare": prepare,
            "skip": skip,
        }
        died_in, why = _once(spec, run["confine"], run, skip, say)
        if why is None:
            break
        run["failed"].append(f"{died_in or 'start'}: {why}")
        say(f"  {run['failed'][-1]}")
        if died_in is None:
            break
        skip.append(died_in)
    run["seconds"] = round(time.monotonic() - begin, 1)


def _once(
    spec: dict[str, Any], confinement: str, run: dict[str, Any], done: list[str], say: Say
) -> tuple[str | None, str | None]:
    """Starts a process and reads what it writes until it ends: the row that it died in, and why."""
    with tempfile.TemporaryDirectory() as folder:
        given, lines, log = (Path(folder) / name for name in ("spec.json", "lines", "log"))
        given.write_text(json.dumps(spec))
        lines.touch()
        command = [sys.executable, "-m", "qk.bench.worker", str(given), str(lines)]
        environment = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        if confinement == "vnni":
            command = [sys.executable, confine.__file__, *command]
            environment |= {"QK_ISA": ISA_OF[confinement]}
        begun: str | None = None
        limit = PREPARE_SECONDS if spec["prepare"] else ROW_SECONDS
        with log.open("w") as sink, lines.open() as source:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
            heard, why, half = time.monotonic(), None, ""
            try:
                while True:
                    ended = process.poll() is not None
                    for text in source:
                        half += text
                        if half.endswith("\n"):  # else the worker is still writing it
                            heard, begun = time.monotonic(), _hear(json.loads(half), run, done, begun, say)
                            half = ""
                    if ended:
                        break
                    if time.monotonic() - heard > limit:
                        why = f"no word for {limit:.0f} s"
                        break
                    time.sleep(0.02)
            finally:
                if process.poll() is None:
                    process.kill()
                code = process.wait()
        if code == 0:
            return None, None
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return begun, why or f"the process ended with {code}: {said[-1] if said else 'no word'}"


def _hear(line: dict[str, Any], run: dict[str, Any], done: list[str], begun: str | None, say: Say) -> str | None:
    """Takes in one line of a worker; the row that it works on now."""
    if "begin" in line:
        return line["begin"]
    if "prepared" in line:
        run["failed"] += [f"{line['prepared']}: {name}: {why}" for name, why in line["failed"].items()]
        done.append(line["prepared"])
        return None
    if "row" in line:
        run["rows"].append(line["row"])
        done.append(line["row"]["name"])
        say(describe(line["row"]))
        return None
    run.update({key: line[key] for key in ("machine", "limits", "peers", "missing") if key not in run})
    return begun


def describe(row: dict[str, Any]) -> str:
    """Lines for a terminal: medians, spread, speed, share of the limit, and what a peer took over ours of its width."""
    lines = [row["name"]]
    for entry in sorted(row["entries"], key=lambda e: (not e["ours"], e["ms"][1])):
        low, middle, high = entry["ms"]
        notes = [f"{row['operations'] / middle / 1e6:.0f} GOP/s"] if row["operations"] else []
        if "limit_ms" in entry:
            notes.append(f"{100 * entry['limit_ms'] / middle:.0f} % of the limit")
        mine = None if entry["ours"] else _counterpart(entry["family"], row)
        if mine is not None:
            notes.append(f"{middle / mine['ms'][1]:.2f} x {mine['name']}")
        lines.append(f"  {entry['name']:34s}{middle:10.4f} ms ({low:.4f}-{high:.4f})  " + ", ".join(notes))
    lines += [f"  {name + ': ' if name else ''}{why}" for name, why in row["failed"].items()]
    return "\n".join(lines)


def _counterpart(family: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """Ours whose weights are as wide as those of a peer's family; the fastest of ours for all others."""
    mine = [e for e in row["entries"] if e["ours"]]
    alike = (e for e in mine if e["family"].startswith(family))
    return next(alike, min(mine, key=lambda e: e["ms"][1], default=None))
