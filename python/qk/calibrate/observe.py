"""What calibration keeps of a tensor that is too large to keep: exact ends and a sample or a histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from qk.calibrate.ranges import HISTOGRAM_BINS

SAMPLE = 2**18  # values kept of a tensor, over all batches


class Observer:
    """Sees one tensor batch by batch: its minimum and maximum, and a sample of at most `limit` values.

    The sample is random with a fixed seed: equal for equal data. Whenever it is full, half of it goes and the rate of
    what follows halves, so every batch is represented alike. A regular stride would see the same columns of an image.
    """

    def __init__(self, name: str, limit: int = SAMPLE) -> None:
        self.name, self.limit = name, limit
        self.low, self.high = torch.inf, -torch.inf
        self.ends: list[tuple[float, float]] = []  # of each tensor
        self.is_finite = True
        self._kept = torch.empty(0, dtype=torch.float32)
        self._rate = 1.0
        self._generator = torch.Generator().manual_seed(0)

    @property
    def seen(self) -> bool:
        """Whether a value reached it."""
        return self.low <= self.high

    def see(self, x: Tensor) -> None:
        """Takes part of x in. A tensor with a NaN or an infinity is left out and makes is_finite False."""
        if x.numel() == 0:
            return
        low, high = (float(end) for end in torch.aminmax(x.detach()))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            self.is_finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.ends.append((low, high))
        self._keep(x.detach().reshape(-1).float())

    def _keep(self, values: Tensor) -> None:
        while self._kept.numel() + int(values.numel() * self._rate) > self.limit:
            self._kept = self._draw(self._kept, self._kept.numel() // 2)
            self._rate /= 2
        taken = values if self._rate == 1 else self._draw(values, max(1, int(values.numel() * self._rate)))
        self._kept = torch.cat([self._kept, taken.cpu()])

    def _draw(self, values: Tensor, count: int) -> Tensor:
        chosen = torch.randint(max(1, values.numel()), (count,), generator=self._generator)
        return values[chosen.to(values.device)]

    def sample(self) -> Tensor:
        """[1, values]"""
        return self._kept.reshape(1, -1)


class HistogramObserver(Observer):
    """Also counts |x| in bins from 0 up. A larger value doubles the bins' width, so the counts stay exact."""

    def __init__(self, name: str, bins: int = HISTOGRAM_BINS) -> None:
        super().__init__(name, limit=1)
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.width = 0.0

    def _keep(self, values: Tensor) -> None:
        bins = self.counts.numel()
        reach = max(-self.low, self.high)
        if reach == 0:
            return
        if self.width == 0:
            self.width = reach / bins
        while reach > self.width * bins:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(bins // 2, dtype=torch.float64)])
            self.width *= 2
        counts = torch.histc(values.abs(), bins, 0, self.width * bins)
        self.counts += counts.cpu().double()
