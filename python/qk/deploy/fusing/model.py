"""The fused model: a module with the interface of the model it was made from."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from qk.deploy.fusing.regions import Region
from qk.deploy.pages import in_huge_pages
from qk.errors import fail
from qk.inputs import describe


class ExpectedTensor(NamedTuple):
    """sizes: None where any fits."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | None, ...]


class ExpectedValue(NamedTuple):
    """Of what is no tensor: the example's, on which the graph was made."""

    name: str
    value: Any


class Inputs(nn.Module):
    """Refuses inputs that the graph was not made for."""

    def __init__(self, expected: list[ExpectedTensor | ExpectedValue]) -> None:
        super().__init__()
        self.expected = expected

    def forward(self, *inputs: Any) -> None:
        for given, expected in zip(inputs, self.expected, strict=True):
            if isinstance(expected, ExpectedValue):
                name, value = expected
                if type(given) is not type(value) or given != value:
                    advice = "Fuse the model again with an example that has it; the unfused model takes any."
                    got = describe(given) if isinstance(given, Tensor) else repr(given)[:100]
                    raise fail("FusedModel", name, f"{value!r}, as in the example", got, advice)
                continue
            name, dtype, sizes = expected
            if not isinstance(given, Tensor) or given.layout != torch.strided:
                raise fail("FusedModel", name, "a dense tensor", describe(given))
            if given.dtype != dtype:
                got = str(given.dtype).removeprefix("torch.")
                wanted = str(dtype).removeprefix("torch.")
                raise fail("FusedModel", name, wanted, got, f"Convert it with {name}.to(torch.{wanted}).")
            fits = given.dim() == len(sizes) and all(
                size is None or size == n for n, size in zip(given.shape, sizes, strict=True)
            )
            if not fits:
                words = "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
                advice = "Fuse the model again with an example of that shape; the unfused model takes any."
                raise fail("FusedModel", name, words, list(given.shape), advice)


class FusedModel(nn.Module):
    """Computes what the unfused integer network does, bit for bit; only for inference.

    report: (module or operator, reason) for everything that stays between the integer regions. regions: what each call
    of torch.ops.qk.network runs. batch: the number of rows that it is for, where the model took it for a constant; else
    None. It stays on the device and in the types that it was made with.
    """

    def __init__(self, body: fx.GraphModule, regions: list[Region], report: list[tuple[str, str]]) -> None:
        super().__init__()
        self.body, self.regions, self.report = body, regions, report
        self.batch: int | None = None
        self.forward = body.forward  # not a method of its own: this one has the names of the model's arguments
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forward = self.body.forward
        for name, buffer in list(self.body.named_buffers(recurse=False)):  # copies and pickles know nothing of pages
            setattr(self.body, name, in_huge_pages(buffer))

    @property
    def steps(self) -> dict[str, int]:
        """How many fused steps of each kind there are."""
        return dict(sorted(Counter(op for region in self.regions for op, _ in region.steps).items()))

    def _apply(self, fn: Any, recurse: bool = True) -> FusedModel:
        first = next(iter((*self.parameters(), *self.buffers())), torch.empty(0))
        before = first.new_empty(1, dtype=torch.float32)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            got = f"{after.device} and {after.dtype}"
            advice = "Move or convert the unfused model, then fuse it again."
            raise fail("FusedModel", "device and dtype", f"{before.device} and {before.dtype}, as made", got, advice)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        steps = ", ".join(f"{count} {op}" for op, count in self.steps.items())
        regions = f"{len(self.regions)} regions" + (f": {steps}" if steps else "")
        return f"{regions}; {len(self.report)} left in float"
