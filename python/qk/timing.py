"""How long calls take: alternating in one process, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def alternate(calls: list[Callable[[], object]], seconds: float = 0.5, rounds: int = 15) -> list[list[float]]:
    """Milliseconds of every call, in order; at least `rounds` of each, about `seconds` in all, after a warm-up.

    A call is repeated within one timing until that takes 0.2 ms, the clock's noise being some microseconds.
    """
    repeats = []
    for call in calls:
        took = min(milliseconds(call, 1) for _ in range(3))
        repeats.append(max(1, round(0.2 / max(took, 1e-4))))
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds or time.perf_counter() < end:
        for kept, call, n in zip(times, calls, repeats, strict=True):
            kept.append(milliseconds(call, n))
    return times


def quantile(times: list[float], share: float) -> float:
    """The value that `share` of the times do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(call: Callable[[], object], n: int = 1) -> float:
    """Of one call, on average over n."""
    start = time.perf_counter()
    for _ in range(n):
        call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / n
