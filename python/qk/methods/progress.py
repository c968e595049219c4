"""How far a long run is: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time

from rich import progress as rich_progress
from rich.console import Console

from qk.errors import fail

KINDS = ("auto", "bar", "lines", "off")


class Progress:
    """kind: "auto" is a bar on a terminal and lines elsewhere."""

    def __init__(self, kind: str, stage: str, units: int, iterations: int) -> None:
        if kind not in KINDS:
            raise fail(stage, "progress", f"one of {', '.join(KINDS)}", repr(kind))
        console = Console(stderr=True)
        self.kind = ("bar" if console.is_terminal else "lines") if kind == "auto" else kind
        self.units, self.iterations, self.done = units, iterations, 0
        columns = ("{task.description}", rich_progress.BarColumn(), "loss {task.fields[loss]}")
        self._bar = rich_progress.Progress(*columns, rich_progress.TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("", total=units * iterations, loss="-")

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
            self._bar.update(self._task, completed=self.done * self.iterations + iteration, loss=f"{loss:.4g}")

    def end(self, before: float, after: float, kept: str) -> None:
        """The unit is done. kept: learned or nearest."""
        note = " (nearest rounding kept)" if kept == "nearest" else ""
        self.finish(f"loss {before:.4g} -> {after:.4g}", note)

    def finish(self, words: str, note: str = "") -> None:
        """The unit is done, with this result."""
        self.done += 1
        if self.kind == "lines":
            seconds = time.perf_counter() - self._began
            line = f"[{self.done}/{self.units}] {self.name}: {words} in {seconds:.1f} s{note}"
            print(line, file=sys.stderr, flush=True)
