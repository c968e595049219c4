"""Finished units of a reconstruction on disk, so that a run that was killed goes on where it was.

One safetensors file for each unit, put in place by a rename when the unit is done. Its header names the run that it is
of: everything that the bits depend on. A file of another run is refused, never used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor
from torch.utils._pytree import tree_flatten

from qk import _native
from qk.errors import fail
from qk.files import TEMPORARY, replace_file, writable_folder
from qk.inputs import device_of, digest
from qk.machine import qk_version
from qk.methods.engine import STAGE
from qk.prepare.prepared import Prepared, Unit
from qk.spec import Recipe

FORMAT = 1
ANEW = "Delete the folder to start anew, or give another one."
NAME = re.compile(r"unit-\d{4,}\.safetensors")
# Fields of a recipe on which no bit of the learning depends.
NO_MATTER = ("memory_mb", "only_faster", "bias_correction", "match_statistics")


class Finished:
    """What a run has finished, in a folder. run: everything that its bits depend on (run_of).

    Raises QkError, before anything is learned, for a folder that cannot be written, and for one with a file that is
    damaged or of another run: another model, other data, another recipe, plan, version or number of threads.
    """

    def __init__(
        self,
        folder: str | Path,
        p: Prepared,
        units: list[Unit],
        run: dict[str, Any],
        stage: str = STAGE,
    ) -> None:
        self.folder = writable_folder(folder, stage)
        self.p, self.units, self.stage = p, units, stage
        self.run = run
        for left in self.folder.glob(f"{TEMPORARY}*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.found = {number: self._read(number) for number in range(len(units)) if self._path(number).exists()}

    def restore(self, number: int) -> bool:
        """Puts a unit's codes, steps and history back; False if it is not finished."""
        if number not in self.found:
            return False
        tensors, history = self.found[number]
        layers = self.p.quant_layers()
        with torch.no_grad():
            for name in self.units[number].layers:
                layer = layers[name]
                layer.last_codes = tensors[f"{name}.codes"].to(layer.weight.device)
                if not layer.spec.dynamic:
                    layer.input.step.copy_(tensors[f"{name}.step"])
        self.p.history[self.units[number].name] = history
        return True

    def add(self, number: int) -> None:
        """Writes a unit that is done now."""
        unit, layers = self.units[number], self.p.quant_layers()
        tensors = {}
        for name in unit.layers:
            tensors[f"{name}.codes"] = layers[name].last_codes.cpu()
            if not layers[name].spec.dynamic:
                tensors[f"{name}.step"] = layers[name].input.step.detach().cpu().clone()  # linked layers share it
        header = {"unit": unit.name, "history": self.p.history[unit.name]}
        write_checked(self._path(number), self.stage, self.run, header, tensors)

    def _path(self, number: int) -> Path:
        return self.folder / f"unit-{number:04d}.safetensors"

    def _read(self, number: int) -> tuple[dict[str, Tensor], list[dict]]:
        unit = self.units[number].name
        path, what = self._path(number), "a finished unit"
        history, tensors = read_checked(path, self.stage, self.run, what, "history", {"unit": unit})
        return tensors, list(history)


def write_checked(path: Path, stage: str, run: dict[str, Any], header: dict[str, Any], tensors: dict) -> None:
    """Replaces a file of `run`, which read_checked reads."""
    header = {"format": FORMAT, "run": run, "content": digest(sorted(tensors.items())), **header}
    try:
        replace_file(path, tensor_bytes(tensors, {"qk": json.dumps(header)}))
    except OSError as error:
        raise fail(stage, str(path.parent), "a folder that can be written", error.strerror or error) from error


def read_checked(
    path: Path, stage: str, run: dict[str, Any], what: str, field: str, fixed: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """A field of the header of `what`, and its tensors. fixed: other fields as they must be.

    Raises QkError for a file that is damaged, and for one of another run or with other fields.
    """
    fixed = {"format": FORMAT, **(fixed or {})}
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["qk"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        other = differences(run, dict(header["run"]))
        other += [f"{name} {header[name]!r}" for name, value in fixed.items() if header[name] != value]
        found, whole = header[field], header["content"] == digest(sorted(tensors.items()))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise fail(stage, str(path), what, f"{type(error).__name__}: {error}", ANEW) from error
    if other:
        raise fail(stage, str(path), "of the same run", f"another: {'; '.join(other)}", ANEW)
    if not whole:
        raise fail(stage, str(path), "as it was written", "other numbers", ANEW)
    return found, tensors


def remove(folder: str | Path) -> None:
    """Takes away what Finished wrote, and the folder if nothing else is in it."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) or path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def run_of(p: Prepared, units: list[Unit], batches: list, recipe: Recipe, steps: str) -> dict[str, Any]:
    """What the bits of a reconstruction depend on. steps: digest of the activation steps that it starts from."""
    return facts(p, units, batches, recipe) | {"calibrated steps": steps}


def facts(p: Prepared, units: list[Unit], batches: list, recipe: Recipe | None = None) -> dict[str, Any]:
    """What the bits of a reconstruction depend on, but the steps, as JSON. recipe: None where none is used."""
    weights = [(name, tensor) for name, tensor in p.model.state_dict().items() if not _is_learned(name)]
    said = {} if recipe is None else recipe.to_dict()
    named = {} if recipe is None else {"recipe": {k: v for k, v in said.items() if k not in NO_MATTER}}
    return named | {
        "qk": qk_version(),
        "torch": torch.__version__,
        "instruction set": _native.active_isa(),
        "device": str(device_of(p.model).type),
        "threads": torch.get_num_threads(),
        "plan": digest([(name, repr(spec)) for name, spec in p.plan.layers.items()]),
        "units": digest([(unit.name, repr((unit.layers, unit.chain))) for unit in units]),
        "model": digest(weights),
        "batches": batches_digest(batches),
    }


def batches_digest(batches: list) -> str:
    """Of their tensors and how these are nested."""
    leaves = [leaf for batch in batches for leaf in tree_flatten(batch)[0]]
    return digest([(repr(tree_flatten(b)[1]), "") for b in batches] + [("", leaf) for leaf in leaves])


def steps_digest(p: Prepared) -> str:
    """Of the activation steps as they are now."""
    return digest([(name, layer.input.step) for name, layer in p.quant_layers().items() if not layer.spec.dynamic])


def _is_learned(name: str) -> bool:
    return name.rpartition(".")[2] in ("codes", "tail_codes") or f".{name}".endswith(".input.step")


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What of the run differs, in words; of a recipe field by field."""
    found = []
    for key in mine:
        a, b = mine[key], theirs.get(key)
        if key == "recipe" and isinstance(b, dict):
            found += [f"recipe.{k} {b.get(k)!r} instead of {a[k]!r}" for k in a if a[k] != b.get(k)]
        elif a != b:
            is_digest = isinstance(a, str) and len(a) == 64
            found.append(f"other {key}" if is_digest else f"{key} {b!r} instead of {a!r}")
    return found
