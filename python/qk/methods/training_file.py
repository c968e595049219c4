"""How far a training is, in one safetensors file, so that a run that was killed goes on to the same bits.

The file is replaced as a whole. Its header names the run, as those of finished units do (qk.methods.resume).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qk.files import TEMPORARY, writable_folder
from qk.methods.resume import facts, read_checked, write_checked
from qk.prepare.prepared import Prepared
from qk.spec import Recipe

FILE = "training.safetensors"


@dataclass
class Place:
    """How far a training is. epoch: how many are done; step and total: steps in the next one, and the sum of their
    losses; records: one for each epoch; best_score, best_epoch: of the best weights so far; random: of torch, after
    `step` steps."""

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = 0.0
    best_epoch: int = 0
    random: dict[str, Tensor] = field(default_factory=dict)

    def next_epoch(self) -> None:
        """An epoch is done."""
        self.epoch, self.step, self.total, self.random = self.epoch + 1, 0, 0.0, {}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, each once."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}


@torch.no_grad()
def set_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Puts what values_of gave into the model."""
    for name, tensor in _tensors(model):
        tensor.copy_(values[name])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch, on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts back what random_state gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class TrainingFile:
    """The file of one run in a folder. found: what it holds already, or None.

    Raises QkError, before anything is trained, for a folder that cannot be written, and for a file that is damaged or
    of another run: another model, first batch, recipe, plan, version or number of threads.
    """

    def __init__(self, folder: str | Path, stage: str, p: Prepared, recipe: Recipe, first: Any, more: dict) -> None:
        self.stage, self.path = stage, writable_folder(folder, stage) / FILE
        self.run = facts(p, p.units, [first], recipe) | more
        for left in self.path.parent.glob(f"{TEMPORARY}*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.found = None
        if self.path.exists():
            self.found = read_checked(self.path, stage, self.run, "a training's file", "place")

    def restore(self, place: Place, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Puts what was found into all three; returns the best weights so far."""
        header, tensors = self.found
        for name, value in header.items():
            setattr(place, name, value)
        place.random = _part(tensors, "random")
        set_values(model, _part(tensors, "model"))
        momentum = _part(tensors, "momentum")
        for name, parameter in model.named_parameters():
            if name in momentum:
                optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter.device)
        return _part(tensors, "best")

    def write(self, place: Place, model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> None:
        """Replaces the file."""
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        momentum = {n: state["momentum_buffer"] for n, state in states.items() if "momentum_buffer" in state}
        parts = {"model": values_of(model), "momentum": momentum, "best": best, "random": place.random}
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous()
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        fields = {name: value for name, value in asdict(place).items() if name != "random"}
        write_checked(self.path, self.stage, self.run, {"place": fields}, tensors)


def remove(folder: str | Path) -> None:
    """Takes away what TrainingFile wrote, and the folder if nothing else is in it."""
    folder = Path(folder)
    (folder / FILE).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
