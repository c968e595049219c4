"""The tail of an integer layer: rows of codes that are added to those of their owners (qk.prepare.points).

All rows of the owners, the first ones too, run as a second product on the same input codes, whose sums take the place
of the layer's own results in these channels. So the first product ends as it would without a tail, in codes where codes
are wanted, and only the owners' sums lie in float. A convolution with groups reads, for them, only the channels of the
groups that own a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qk.errors import fail
from qk.ops.pack import row_bytes
from qk.prepare.points import check_owners
from qk.spec import QuantSpec

TAIL = ("tail_packed", "tail_step", "tail_owners")


class Slots(NamedTuple):
    """Where rows of owners stand in a convolution of their own.

    groups: of it, all with equally many rows: `rows` in all, some of them empty. reads: the channels of the input that
    it takes, None for all. places: of each row, None where they stand as they come.
    """

    groups: int
    rows: int
    reads: Tensor | None = None
    places: Tensor | None = None

    def filled(self, tensor: Tensor, nothing: float) -> Tensor:
        """What belongs to the rows [count, ...], at their places; `nothing` where there is none."""
        if self.places is None:
            return tensor
        all_rows = tensor.new_full((self.rows, *tensor.shape[1:]), nothing)
        all_rows[self.places] = tensor
        return all_rows

    def rows_of_owners(self, device: torch.device) -> Tensor:
        return torch.arange(self.rows, device=device) if self.places is None else self.places


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
