"""Sensitivities in a folder: in parts while they are found, so that a run that was killed goes on and several processes
share the work, and whole when they are done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from qk.errors import fail
from qk.files import writable_folder, write_json
from qk.inputs import digest
from qk.methods.resume import ANEW, FORMAT, differences, read_checked, write_checked
from qk.search.items import STAGE
from qk.search.sensitivity import Sensitivity

ROUNDING = ("instruction set", "threads")  # change roundings alone: parts that are summed agree in them
WAIT = 0.05  # seconds before a part that another process works on is looked at again


class Parts:
    """The parts of one estimate. run: everything that their bits depend on. folder: None keeps nothing."""

    def __init__(self, name: str = "", folder: Path | None = None, run: dict[str, Any] | None = None) -> None:
        self.name, self.folder, self.run = name, folder, run or {}

    def all(self, count: int, compute: Callable[[int], list[float]]) -> list[list[float]]:
        """What compute gives for 0 to count - 1: read where a process has left it, else computed now,
        each part by one process. The same bits, whoever computed what."""
        if self.folder is None:
            return [compute(number) for number in range(count)]
        missing = list(range(count))
        while missing:
            taken = [number for number in missing if self._take(number, compute)]
            missing = [number for number in missing if number not in taken]
            if not taken:
                time.sleep(WAIT)
        return [self._read(number) for number in range(count)]

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:04d}.safetensors"

    def _take(self, number: int, compute: Callable[[int], list[float]]) -> bool:
        """Whether the part is there now. False: another process works on it. A lock ends with the process."""
        path = self._path(number)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if path.exists():
                    self._read(number)
                else:
                    values = torch.tensor(compute(number), dtype=torch.float64)
                    write_checked(path, STAGE, self.run, {"part": number}, {"values": values})
        except Timeout:
            return False
        return True

    def _read(self, number: int) -> list[float]:
        what, fixed = "a part of a sensitivity", {"part": number}
        return read_checked(self._path(number), STAGE, self.run, what, "part", fixed)[1]["values"].tolist()


class Folder:
    """Where a search keeps its sensitivities. run: everything that their bits depend on, but kind and seed.

    Raises QkError for a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder, self.run = writable_folder(folder, STAGE), run

    def sensitivity(self, kind: str, seed: int, find: Callable[[Parts], Sensitivity]) -> Sensitivity:
        """Read where it is there, else found and put there.

        Raises QkError for a file that is damaged, or of another model, other data, items, ranges or version; for parts
        that are not whole yet, also of another instruction set or number of threads.
        """
        path = self.folder / f"{kind}-{seed}.json"
        if path.exists():
            return self._read(path)
        parts = self.folder / "parts"
        parts.mkdir(exist_ok=True)
        found = find(Parts(f"{kind}-{seed}", parts, self.run))
        numbers = {"losses": found.losses, "pairs": [[i, j, table] for (i, j), table in found.pairs.items()]}
        data = {"format": FORMAT, "run": self.run, "kind": kind, "unit": found.unit, "content": _content(numbers)}
        write_json(path, data | numbers, STAGE)
        return found

    def _read(self, path: Path) -> Sensitivity:
        try:
            data = json.loads(path.read_text())
            run = {name: fact for name, fact in self.run.items() if name not in ROUNDING}
            other = differences(run, dict(data["run"]))
            other += [] if data["format"] == FORMAT else [f"format {data['format']!r}"]
            whole = data["content"] == _content({name: data[name] for name in ("losses", "pairs")})
            pairs = {(i, j): table for i, j, table in data["pairs"]}
            found = Sensitivity(data["kind"], data["losses"], pairs, data["unit"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise fail(STAGE, str(path), "a sensitivity", f"{type(error).__name__}: {error}", ANEW) from error
        if other:
            raise fail(STAGE, str(path), "of the same run", f"another: {'; '.join(other)}", ANEW)
        if not whole:
            raise fail(STAGE, str(path), "as it was written", "other numbers", ANEW)
        return found


def _content(numbers: dict[str, Any]) -> str:
    return digest([(json.dumps(numbers), "")])
