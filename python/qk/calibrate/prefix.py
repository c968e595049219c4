"""Runs a model again and again with other steps, without repeating what comes before the first step that moved.

The model is any Python; what stands in for tracing it is this: while a batch runs, every module that holds quantized
layers is remembered with its output and with the steps that had a part in it, which are those of all quantized layers
that ran so far. As long as these are equal, the module's next call on the same batch would see the same inputs and give
the same output, so a copy of that is returned and nothing inside runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qk.calibrate.batches import call
from qk.inputs import tensors_in
from qk.prepare.insert import QuantLayer
from qk.prepare.prepared import Prepared

PLAIN = (int, float, bool, str, type(None))  # what an output may hold beside tensors


@dataclass
class _Output:
    """What a module gave. steps: positions of the steps that had a part in it; values: what they were. inside: the
    watched modules that ran in its call, itself first."""

    leaves: list[Any]
    spec: TreeSpec
    steps: frozenset[int]
    at: np.ndarray
    values: np.ndarray
    inside: tuple[str, ...]
    nbytes: int

    def holds(self, values: np.ndarray) -> bool:
        return bool((values[self.at] == self.values).all())

    def copy(self) -> Any:
        """What follows may work in place."""
        return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.leaves], self.spec)


class PrefixCache:
    """p.model on numbered batches. Inside `with` the modules of p's units and its quantized layers are watched.

    uses: quantized layer -> positions of its steps in the vector of all. memory_mb: for outputs; what does not fit runs
    again. An output is kept from the second call on with equal steps before it: those do not move at the moment.
    Never kept: a module that runs more than once in a pass, writes into its inputs, returns one of them or something
    that is no tensor or number. `hits` counts calls that were answered, `misses` those that ran.
    """

    def __init__(self, p: Prepared, uses: dict[QuantLayer, Sequence[int]], memory_mb: float, stage: str) -> None:
        self.p, self.uses, self.stage = p, uses, stage
        self.left = int(memory_mb * 2**20)
        self.enabled = self.left > 0
        self.hits = self.misses = 0
        self._kept: dict[tuple[str, int], _Output] = {}
        self._repeated: set[str] = set()
        self._values = self._before = np.empty(0)
        self._batch = 0
        self._used: set[int] = set()
        self._ran: list[str] = []  # in the pass of now, in the order in which they began
        self._originals: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> PrefixCache:
        p = self.p
        names = dict.fromkeys([*(unit.name for unit in p.units), *p.joins, *p.quant_layers()])
        for name in names:
            module = p.model.get_submodule(name)
            self._originals.append((module, vars(module).get("forward")))
            module.forward = self._watched(name, module, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for module, own in reversed(self._originals):
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._originals.clear()
        self._kept.clear()

    def move(self, values: np.ndarray) -> None:
        """From now on the steps are these; to be called once for each pass over the batches."""
        self._before, self._values = self._values, values.copy()

    def run(self, index: int, batch: Any) -> Any:
        """The model's output for a batch. index: names the batch; the same one always has the same content."""
        self._batch, self._used, self._ran = index, set(), []
        return call(self.p, batch, index, self.stage)

    def close(self) -> None:
        """From now on everything runs."""
        self.enabled = False
        self._kept.clear()

    def _watched(self, name: str, module: nn.Module, forward: Callable) -> Callable:
        own = self.uses.get(module, ()) if isinstance(module, QuantLayer) else ()
        readers = [module.get_submodule(reader) for reader in self.p.joins.get(name, ())]
        first = {at for reader in readers for at in self.uses.get(reader, ())}  # their quantizer worked at the entry

        def run(*args: Any, **kwargs: Any) -> Any:
            key = (name, self._batch)
            if name in self._ran:
                self._repeated.add(name)
                self._drop(key)
            usable = self.enabled and name not in self._repeated
            kept = self._kept.get(key) if usable else None
            if kept is not None and kept.holds(self._values):
                self.hits += 1
                self._ran += kept.inside
                self._used |= kept.steps
                return kept.copy()
            self.misses += 1
            start = len(self._ran)
            self._ran.append(name)
            given = [(x, x._version) for x in tensors_in((args, kwargs))]
            self._used |= first
            output = forward(*args, **kwargs)
            self._used |= set(own)
            inside = tuple(self._ran[start:])
            if self.enabled and name not in self._repeated and self._is_still():
                self._keep(key, output, given, inside)
            return output

        return run

    def _is_still(self) -> bool:
        """Whether nothing that ran so far has moved since the pass before."""
        if self._before.shape != self._values.shape:
            return False
        at = list(self._used)
        return bool((self._before[at] == self._values[at]).all())

    def _keep(
        self, key: tuple[str, int], output: Any, given: list[tuple[Tensor, int]], inside: tuple[str, ...]
    ) -> None:
        self._drop(key)
        leaves, spec = tree_flatten(output)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        places = [x.untyped_storage().data_ptr() for x in tensors]
        size = sum(x.nbytes for x in tensors)
        if (
            size > self.left
            or not all(isinstance(x, (Tensor, *PLAIN)) for x in leaves)
            or any(x._version != version for x, version in given)
            or set(places) & {x.untyped_storage().data_ptr() for x, _ in given}
            or len(set(places)) < len(places)
            or any(x.stride() != torch.empty_like(x, device="meta").stride() for x in tensors)  # a copy lies otherwise
        ):
            return
        self.left -= size
        at = np.array(sorted(self._used), dtype=np.int64)
        copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self._kept[key] = _Output(copies, spec, frozenset(self._used), at, self._values[at], inside, size)

    def _drop(self, key: tuple[str, int]) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self.left += old.nbytes
