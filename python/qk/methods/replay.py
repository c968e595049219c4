"""An iteration of learning as a CUDA graph: recorded once for each shape of sample, then replayed by one call.

A unit's iteration is some hundred small kernels, and starting them takes longer than they run. No GPU has run this yet:
it is tested with a recorder of torch's operators in the place of CUDA's, which sees as little of what Python computes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qk.methods.cache import Sample

WARM = 3  # iterations of a shape that run as they are: the optimizer makes its state, libraries choose their kernels
Iterate = Callable[[Sample], Tensor]


class CudaGraphs:
    """How CUDA records."""

    @contextmanager
    def warming(self) -> Iterator[None]:
        """For what runs before a recording: on a stream of its own, as autograd ties what it makes to a stream."""
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            yield
        torch.cuda.current_stream().wait_stream(own)

    def record(self, body: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What body gives, in the memory where each replay writes it, and the replay. Recording computes nothing.

        Raises RuntimeError where body waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = body()
        return found, graph.replay


class Replay:
    """Calls `iterate` for each sample, from the fourth of a shape on by a graph.

    iterate: gives a loss. What changes between iterations, other than the sample, it reads from tensors that stay where
    they are. Where it can't be recorded, as a module asks for a value, it goes on as it is, with a warning.
    """

    def __init__(self, iterate: Iterate, graphs: CudaGraphs | None = None) -> None:
        self.iterate, self.graphs = iterate, graphs or CudaGraphs()
        self.seen: Counter[int] = Counter()
        self.recorded: dict[int, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}
        self.refused = False

    def __call__(self, sample: Sample) -> Tensor:
        """The loss, which the next call may write over."""
        part = sample.part
        if part not in self.recorded and self.seen[part] >= WARM and not self.refused:
            self._record(sample)
        if part not in self.recorded:
            self.seen[part] += 1
            with self.graphs.warming():
                return self.iterate(sample)
        inputs, loss, replay = self.recorded[part]
        for kept, new in zip(inputs, _tensors(sample), strict=True):
            kept.copy_(new)
        replay()
        return loss

    def _record(self, sample: Sample) -> None:
        try:
            loss, replay = self.graphs.record(lambda: self.iterate(sample))
        except RuntimeError as error:
            self.refused = True
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"qk.reconstruct: a unit is learned without CUDA graphs, as {reason}", stacklevel=2)
            return
        self.recorded[sample.part] = _tensors(sample), loss, replay


def _tensors(sample: Sample) -> list[Tensor]:
    leaves = tree_leaves((sample.args, sample.kwargs, sample.target, sample.weight))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
