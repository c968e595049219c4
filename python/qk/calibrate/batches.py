"""Calibration data as it comes from outside: checked, bounded, and run through a model with errors that name the batch.

A batch is a tensor, a tuple or list (positional arguments) or a dict (keywords). Labels are not guessed: the caller
gives inputs only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qk.errors import QkError, fail
from qk.prepare.prepared import Prepared

UNSIZED_LIMIT = 64  # batches taken from an iterable that does not say how long it is


def tensors_of(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def shapes_of(batch: Any) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors_of(batch)) or type(batch).__name__


def take(batches: Iterable, stage: str, max_batches: int | None = None) -> Iterator[Any]:
    """The batches, at most max_batches of them.

    By default something with a length (a list, a DataLoader) is consumed whole, and something without one stops after
    UNSIZED_LIMIT batches, with a warning if it had more. Raises QkError for what is no iterable, or an empty one.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise fail(stage, "batches", "an iterable of batches", type(batches).__name__, "Put a single batch in a list.")
    if max_batches is not None and max_batches < 1:
        raise fail(stage, "max_batches", "at least 1, or None", max_batches)
    limit = max_batches
    if limit is None and _length(batches) is None:
        limit = UNSIZED_LIMIT
    count = 0
    for batch in batches:
        if count == limit:
            if max_batches is None:
                warnings.warn(
                    f"{stage}: batches has no length and goes on after {limit} batches; only these were used. "
                    "Pass max_batches, or a list.",
                    stacklevel=3,
                )
            return
        if not isinstance(batch, (Tensor, tuple, list, Mapping)) or not tensors_of(batch):
            raise fail(stage, f"batch {count}", "a tensor, tuple or dict of tensors", type(batch).__name__)
        yield batch
        count += 1
    if count == 0:
        hint = "A generator that was used before is empty: pass a list." if _length(batches) is None else ""
        raise fail(stage, "batches", "at least one batch", "none", hint)


def hold(batches: Iterable, stage: str, max_batches: int | None, memory_mb: int) -> list[Any]:
    """The batches as a list, so that every pass sees the same ones in the same order.

    A list is held already. Anything else (a generator would be empty the second time, a shuffling DataLoader would
    differ) is read once. Raises QkError when that would take more than memory_mb.
    """
    if isinstance(batches, (list, tuple)):
        return list(take(batches, stage, max_batches))
    held, room = [], memory_mb * 2**20
    for batch in take(batches, stage, max_batches):
        room -= sum(t.nbytes for t in tensors_of(batch))
        if room < 0:
            got = f"more after {len(held)} batches"
            raise fail(stage, "batches", f"at most {memory_mb} MB", got, "Raise memory_mb, or pass fewer batches.")
        held.append(batch)
    return held


def call(p: Prepared, batch: Any, index: int, stage: str) -> Any:
    """p.model on one batch, on the model's device. What the model raises becomes a QkError that names the batch."""
    device = device_of(p.model)
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    try:
        return _splat(p.model, batch)
    except (QkError, Stop):
        raise
    except Exception as error:
        first = next(iter(p.layers.values()), None)
        example = f", as in prepare's example (its first layer saw {list(first.input_shape)})" if first else ""
        got = f"shapes {shapes_of(batch)}: {type(error).__name__}: {error}".rstrip(".")
        raise fail(stage, f"batch {index}", f"input that the model takes{example}", got) from error


def device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


class Stop(Exception):
    """Raised by a hook to leave the model early; `call` lets it through."""


def _splat(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _length(batches: Iterable) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader over an IterableDataset
        return None
