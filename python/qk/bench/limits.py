"""What the machine can do at most, measured in the run whose figures are held against it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import log
from typing import Any

from qk import _core, _native

SIZES = tuple(2**i for i in (14, 15, 17, 19, 20, 21, 22, 23, 24, 25, 26, 28))  # bytes that all threads read together


def measure(threads: int, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """products: operations a second (two for each pair of codes) of each instruction set, on registers alone. read:
    [bytes, bytes a second] of memory of that size."""
    products = {}
    for isa in _native.usable_isas():
        if isa in ("avx512vnni", "amx") or len(_native.usable_isas()) < 3:
            _native.force_isa(isa)
            products[isa] = _products(threads)
    _native.force_isa("")
    return {"products": products, "read": [[size, _core.probe_bandwidth(size, threads)] for size in sizes]}


def _products(threads: int, seconds: float = 0.02, tries: int = 5) -> float:
    """All threads at once; the best of some tries."""
    each = _core.probe_products(1)
    begin = time.perf_counter()
    _core.probe_products(10_000)
    rounds = max(1, round(seconds / (time.perf_counter() - begin) * 10_000))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(tries):
            begin = time.perf_counter()
            list(pool.map(_core.probe_products, [rounds] * threads))  # gives the GIL back
            best = max(best, threads * rounds * each / (time.perf_counter() - begin))
    return best


def bandwidth(limits: dict[str, Any], size: int) -> float:
    """Bytes a second from memory of that size, between the measured ones along logarithms."""
    points = limits["read"]
    if size <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if size <= high:
            share = log(size / low) / log(high / low)
            return slow * (fast / slow) ** share
    return points[-1][1]


def seconds(limits: dict[str, Any], operations: int, moved: int, isa: str | None = None) -> float:
    """The least time of so many operations and bytes: the longer of both. isa: None is the fastest."""
    products = limits["products"]
    peak = products.get(isa) or max(products.values())
    return max(operations / peak, moved / bandwidth(limits, moved) if moved else 0.0)
