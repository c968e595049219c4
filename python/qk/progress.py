"""How far a long run is: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time

from rich import progress as rich_progress
from rich.console import Console

from qk.errors import fail

KINDS = ("auto", "bar", "lines", "off")


class Progress:
    """kind: "auto" is a bar on a terminal and lines elsewhere. total: iterations of all units; None: nobody knows."""

    def __init__(self, kind: str, stage: str, units: int, total: int | None) -> None:
        if kind not in KINDS:
            raise fail(stage, "progress", f"one of {', '.join(KINDS)}", repr(kind))
        console = Console(stderr=True)
        self.kind = ("bar" if console.is_terminal else "lines") if kind == "auto" else kind
        self.units, self.done, self.iterations = units, 0, 0  # units and iterations of those that are done
        columns = ("{task.description}", rich_progress.BarColumn(), "loss {task.fields[loss]}")
        self._bar = rich_progress.Progress(*columns, rich_progress.TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", total=total, loss="-")

    def __enter__(self) -> Progress:
        if self.kind == "bar":
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.kind == "bar":
            self._bar.stop()

    def unit(self, name: str) -> None:
        """A unit begins."""
        self.name, self._began = name or "model", time.perf_counter()
        self._bar.update(self._task, description=f"{self.name} ({self.done + 1} of {self.units})")

    def at(self, iteration: int, loss: float) -> None:
        """How far the unit is."""
        if self.kind == "bar":
            self._bar.update(self._task, completed=self.iterations + iteration, loss=f"{loss:.4g}")

    def end(self, iterations: int, before: float, after: float, kept: str) -> None:
        """The unit is done. kept: learned, or what it had before."""
        note = "" if kept == "learned" else f" ({kept} kept)"
        self.finish(iterations, f"loss {before:.4g} -> {after:.4g}", note)

    def finish(self, iterations: int, words: str, note: str = "") -> None:
        """The unit is done, with this result."""
        self.done += 1
        self.iterations += iterations
        if self.kind == "lines":
            seconds = time.perf_counter() - self._began
            line = f"[{self.done}/{self.units}] {self.name}: {words} in {seconds:.1f} s{note}"
            print(line, file=sys.stderr, flush=True)
