"""The tail of an integer layer: rows of codes that are added to those of their owners (qk.prepare.points).

All rows of the owners, the first ones too, run as a second product on the same input codes, whose sums take the place
of the layer's own results in these channels. So the first product ends as it would without a tail, in codes where codes
are wanted, and only the owners' sums lie in float. A convolution with groups reads, for them, only the channels of the
groups that own a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from qk import ops
from qk.errors import fail
from qk.ops.pack import row_bytes
from qk.prepare.points import check_owners, parts_of
from qk.spec import QuantSpec

TAIL = ("tail_packed", "tail_step", "tail_owners")
# Made by tail_product.
OF_TAIL = ("tail_prepacked", "tail_steps", "tail_bias", "tail_reads", "tail_index", "tail_source")


class Slots(NamedTuple):
    """Where rows of owners stand in a convolution of their own.

    groups: of it, all with equally many rows: `rows` in all, some of them empty. reads: the channels of the input that
    it takes, None for all. places: of each row, None where they stand as they come.
    """

    groups: int
    rows: int
    reads: Tensor | None = None
    places: Tensor | None = None

    def filled(self, tensor: Tensor, nothing: float | Tensor) -> Tensor:
        """What belongs to the rows [count, ...], at their places; `nothing` where there is none."""
        if self.places is None:
            return tensor
        all_rows = tensor.new_empty(self.rows, *tensor.shape[1:])
        all_rows[:] = nothing
        all_rows[self.places] = tensor
        return all_rows


def slots_for(owners: Tensor, n: int, groups: int, channels: int) -> Slots:
    """owners: int64, of each row. n, groups: channels and groups of the layer's result. channels: of its input, in a
    group.

    With one channel in a group each row becomes a group of its own, which depthwise kernels run.
    """
    if groups == 1:
        return Slots(1, len(owners))
    group = owners // (n // groups)
    if channels == 1:
        return Slots(len(owners), len(owners), group)
    active, index, counts = group.unique(return_inverse=True, return_counts=True)
    rows = int(counts.max())
    earlier = (index[:, None] == index[None]).tril(-1).sum(1)  # rows of the same group that come before
    reads = (active[:, None] * channels + torch.arange(channels, device=owners.device)).flatten()
    return Slots(len(active), len(active) * rows, reads if len(active) < groups else None, index * rows + earlier)


def tail_product(
    tensors: Mapping[str, Tensor | None], shape: tuple[int, ...], bits: int, nothing: int, groups: int
) -> tuple[dict[str, Tensor | None], int]:
    """All rows of the channels of several points as one product, and which of its results make a channel: OF_TAIL, and
    the product's groups. tensors, shape, groups: of an IntegerLayer. nothing: the code of 0."""
    owners, zero, bias = tensors["tail_owners"], tensors["weight_zero"], tensors["bias"]
    parts = parts_of(owners)
    first = owners[parts[0]]  # the channels, as whoever has a third point has a second one
    slots = slots_for(torch.cat([first, owners]), shape[0], groups, shape[-1])
    zero = slots.filled(torch.cat([zero[first], zero.new_full(owners.shape, nothing)]), nothing)
    empty = ops.pack(torch.full((1, prod(shape[1:])), nothing, dtype=torch.uint8, device=owners.device), bits)
    packed = slots.filled(torch.cat([tensors["packed"][first], tensors["tail_packed"]]), empty)
    steps = slots.filled(torch.cat([tensors["weight_step"][first], tensors["tail_step"]]), 1)
    if bias is not None:
        bias = slots.filled(torch.cat([bias[first], torch.zeros_like(tensors["tail_step"])]), 0)
    source = owners.new_full((1 + len(parts), len(first)), -1)
    rows = torch.arange(slots.rows, device=owners.device) if slots.places is None else slots.places
    source[0] = rows[: len(first)]
    for number, part in enumerate(parts, 1):
        source[number, torch.searchsorted(first, owners[part])] = rows[len(first) :][part]
    prepacked = ops.prepack(packed, zero, bits, (len(packed), *shape[1:]), slots.groups)
    reads = None if slots.reads is None else slots.reads.int()
    return dict(zip(OF_TAIL, (prepacked, steps, bias, reads, first.int(), source.int()), strict=True)), slots.groups


def check_tail(stage: str, tensors: dict[str, Tensor | None], spec: QuantSpec, n: int, k: int) -> None:
    """Raises QkError for a tail that is there in part, does not fit, or belongs to a layer of one point."""
    given = {name: tensors[name] for name in TAIL if tensors.get(name) is not None}
    if not given:
        return
    if len(given) < len(TAIL):
        raise fail(stage, "the tail", f"whole: {', '.join(TAIL)}", ", ".join(given))
    if spec.points == 1:
        raise fail(stage, "the tail", "absent in a layer of one point", f"{len(given['tail_owners'])} rows")
    owners, step = given["tail_owners"], given["tail_step"]
    rows = owners.numel()
    expected = {
        "tail_packed": (torch.uint8, (rows, row_bytes(k, spec.storage_bits))),
        "tail_step": (torch.float32, (rows,)),
        "tail_owners": (torch.int64, (max(1, rows),)),
    }
    for name, (dtype, shape) in expected.items():
        got = (given[name].dtype, tuple(given[name].shape))
        if got != (dtype, shape):
            raise fail(stage, name, f"{dtype} {list(shape)}", f"{got[0]} {list(got[1])}")
    if step.is_meta:
        return
    if not bool(((step > 0) & step.isfinite()).all()):
        raise fail(stage, "tail_step", "positive and finite", f"{step.min().item()} to {step.max().item()}")
    check_owners(stage, "tail_owners", owners, n)
