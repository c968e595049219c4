"""A row of a benchmark: one piece of work, and everybody who does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qk.bench.harness import Run


@dataclass
class Candidate:
    """One who does the work of a row.

    name: as the tables show it. family: of ours the widths (W4A8); of a peer, whom ours of that weight width are
    measured against (W8, W4, W2, float32, bfloat16, or int8 of a whole network). run: what is timed. check: raises
    AssertionError if the result is wrong; runs before any timing. moved: bytes that it must read and write. facts: what
    else the page says of it.
    """

    name: str
    family: str
    run: Run
    check: Run
    moved: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.name.split()[0] == "qk"


Source = Callable[[int], Iterable[Candidate]]  # of the number of threads


@dataclass
class Row:
    """kind: what the goals and the page sort by. operations: of one run. sources: who, by name, makes candidates; they
    are made when the row is measured and dropped after it. facts: for the goals, such as the rows of a product."""

    kind: str
    name: str
    sources: dict[str, Source]
    operations: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def meets(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is at most `tolerance` standard deviations of what is expected."""
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    error = float((got.float() - expected).abs().max() / expected.std().clamp(min=1e-12))
    assert error <= tolerance, f"off by {error:.3g} standard deviations, {tolerance:g} are allowed"


def same_bits(got: Tensor, expected: Tensor) -> None:
    """Ours against its definition."""
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {expected.numel()} values differ"
