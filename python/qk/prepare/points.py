"""A weight of several points: some output channels are sums of low-bit rows (docs/methods/multipoint.md).

The first point of every channel lies where its only one would. Every further point is a row of the tail: the second
points, in the order of their channels, then the third ones. A row's channel is its owner. Zeros are the middle code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qk.errors import fail

MOST = 3  # points of a channel


class Tail(NamedTuple):
    """codes: uint8 [T, ...], shaped as rows of the weight. step: float32 [T]. owners: int64 [T]."""

    codes: Tensor
    step: Tensor
    owners: Tensor


def parts_of(owners: Tensor) -> list[slice]:
    """The second points and the third ones: within a part owners rise, so none comes twice."""
    ends = ((owners.diff() <= 0).nonzero().flatten() + 1).tolist()
    return [slice(a, b) for a, b in zip([0, *ends], [*ends, len(owners)], strict=True)]


def add_to_owners(first: Tensor, rows: Tensor, owners: Tensor) -> Tensor:
    """first [N, ...] with the rows of the tail [T, ...] added to their owners': the second points, then the third."""
    for part in parts_of(owners):
        first = first.index_add(0, owners[part], rows[part])
    return first


def last_of(first: Tensor, rows: Tensor, owners: Tensor) -> Tensor:
    """[N, ...]: of each channel what belongs to its last point."""
    last = first.clone()
    for part in parts_of(owners):
        last[owners[part]] = rows[part]
    return last


def with_last(first: Tensor, rows: Tensor, owners: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """first and rows with each channel's last point replaced: last_of the result is `last`, and the rest stays."""
    number = torch.arange(-len(first), len(owners), device=owners.device)  # below 0: a first point
    is_last = last_of(number[: len(first)], number[len(first) :], owners)
    first, rows = first.clone(), rows.clone()
    alone = is_last < 0
    first[alone] = last[alone]
    rows[is_last[~alone]] = last[~alone]
    return first, rows


def check_owners(stage: str, name: str, owners: Tensor, channels: int) -> None:
    """Raises QkError for owners that are no channels, or not in the order that makes sums of one order."""
    if not 0 <= int(owners.min()) <= int(owners.max()) < channels:
        raise fail(stage, name, f"channels, from 0 to {channels - 1}", f"{owners.min()} to {owners.max()}")
    parts = parts_of(owners)
    if len(parts) >= MOST:
        expected = "rising for the second points, then rising for the third ones"
        raise fail(stage, name, expected, f"{len(parts)} rising parts")
    orphans = set(owners[parts[1]].tolist()) - set(owners[parts[0]].tolist()) if len(parts) == 2 else None
    if orphans:
        raise fail(
            stage, name, "third points of channels that have a second", f"channel {min(orphans)}, which has none"
        )
