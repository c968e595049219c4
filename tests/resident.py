"""The memory that a process holds for itself, and scripts that measure it in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def anonymous() -> float:
    """MB of memory that the process holds for itself: pages of a file, which the system may take back, do not count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak:
    """Watches from a thread of its own. rise: MB at the highest, above what was held before."""

    def __enter__(self) -> Peak:
        self._start = self._highest = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, anonymous())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def rise(self) -> float:
        return self._highest - self._start


def measured(script: Path, *args: object) -> Any:
    """What a script prints as JSON."""
    # What is freed goes back to the system at once, or the figures are those of the allocator's habits.
    habits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | habits | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script), *map(str, args)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
