"""Calibration data as it comes from outside: checked, bounded, and run through a model with errors that name the batch.

A batch is a tensor, a tuple or list (positional arguments) or a dict (keywords). Labels are not guessed: the caller
gives inputs only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from qk.errors import QkError, fail
from qk.inputs import KINDS, advice_on, copied_to, describe, device_of, feed, tensors_in
from qk.prepare.prepared import Prepared

UNSIZED_LIMIT = 64  # batches taken from an iterable that does not say how long it is
MASK = "attention_mask"  # the argument by which transformers are told what is padding: 0 there, 1 elsewhere


def take(batches: Iterable, stage: str, max_batches: int | None = None) -> Iterator[Any]:
    """The batches, at most max_batches of them.

    By default something with a length (a list, a DataLoader) is consumed up to that, and something without one up to
    UNSIZED_LIMIT batches, with a warning if it goes on. Raises QkError for what is no iterable, or an empty one.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise fail(stage, "batches", "an iterable of batches", type(batches).__name__, "Put a single batch in a list.")
    if max_batches is not None and max_batches < 1:
        raise fail(stage, "max_batches", "at least 1, or None", max_batches)
    length = _length(batches)
    limit = max_batches or (UNSIZED_LIMIT if length is None else length)
    count = 0
    for batch in batches:
        if count == limit:
            if max_batches is None:
                says = "has no length" if length is None else f"says that its length is {length}"
                text = f"{stage}: batches {says} and goes on after {limit} batches; only these were used. Pass a list."
                warnings.warn(text, stacklevel=3)
            break
        if not isinstance(batch, KINDS) or next(tensors_in(batch), None) is None:
            raise fail(stage, f"batch {count}", "a tensor, tuple or dict of tensors", describe(batch))
        yield batch
        count += 1
    if count == 0:
        hint = "A generator that was used before is empty: pass a list." if length is None else ""
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
        room -= sum(t.nbytes for t in tensors_in(batch))
        if room < 0:
            got = f"more after {len(held)} batches"
            raise fail(stage, "batches", f"at most {memory_mb} MB", got, "Raise memory_mb, or pass fewer batches.")
        held.append(batch)
    return held


def call(p: Prepared, batch: Any, index: int, stage: str) -> Any:
    """p.model on one batch, on the model's device. What the model raises becomes a QkError that names the batch."""
    try:
        return feed(p.model, copied_to(batch, device_of(p.model)))
    except (QkError, Stop):
        raise
    except Exception as error:
        first = next(iter(p.layers.values()), None)
        example = f", as in prepare's example (its first layer saw {list(first.input_shape)})" if first else ""
        got = f"{describe(batch)}, on which it raised {type(error).__name__}: {error}"
        expected = f"input that the model accepts{example}"
        raise fail(stage, f"batch {index}", expected, got, advice_on(batch)) from error


def counting(batch: Any, like: Tensor) -> Tensor | None:
    """Bool [batch, positions]: what of `like` [batch, positions, channels] is no padding, as the batch's attention_mask
    of that size says; None where there is none, and everything counts."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.is_floating_point() or like.dim() != 3 or mask.shape != like.shape[:2]:
        return None
    return (mask != 0).to(like.device)


def unpadded(batch: Any, x: Tensor) -> Tensor:
    """What of x counts: all of it, or [positions, channels] where the batch's attention_mask calls some padding."""
    counted = counting(batch, x)
    return x if counted is None else x[counted]


class Stop(Exception):
    """Raised by a hook to leave the model early; `call` lets it through."""


def _length(batches: Iterable) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader over an IterableDataset
        return None
