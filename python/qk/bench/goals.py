"""What was set out to be reached, and how a run stands to it: geometric means over the rows that a goal names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import Any

Record = dict[str, Any]  # a row of a run, as the worker writes it
WITHOUT_PRODUCTS = ("ours", "load", "W4", "W2")  # families of work that AMX has no part in
LIMIT, VNNI_LIMIT, ANY = "the limit", "the limit without AMX", "any peer"


@dataclass(frozen=True)
class Goal:
    """work: in words. rows: which rows. ours: a family. against: a family of peers, or of ours (qk W8A8), a limit, ANY,
    or a time (0.5 s). least: the ratio to reach, theirs over ours; for a limit its share. threads: None for any."""

    work: str
    rows: Callable[[Record], bool]
    ours: str
    against: str
    least: float
    threads: int | None = None


@dataclass(frozen=True)
class Standing:
    """How a run stands to a goal. ms: of ours, geometric mean. share: of the limit. lowest: of the ratios of rows."""

    goal: Goal
    rows: int
    ms: float
    rival: str
    rival_ms: float | None
    limit_ms: float | None
    ratio: float
    lowest: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal.least


def _kind(kind: str, test: Callable[[dict[str, Any]], bool] = lambda facts: True) -> Callable[[Record], bool]:
    return lambda row: row["kind"] == kind and test(row["facts"])


def _gemm(test: Callable[[int, int, int], bool]) -> Callable[[Record], bool]:
    return _kind("gemm", lambda f: test(f["m"], f["k"], f["n"]))


LARGE = _gemm(lambda m, k, n: m in (128, 512))
MIDDLE = _gemm(lambda m, k, n: m == 16)
CACHED = _gemm(lambda m, k, n: m == 1 and k * n < 2**22)
STREAMED = _gemm(lambda m, k, n: m == 1 and k * n >= 2**22)
DENSE_3X3 = _kind("conv2d", lambda f: f["kernel"] == 3 and f["stride"] == 1 and f["groups"] == 1)
DEPTHWISE = _kind("conv2d", lambda f: f["groups"] > 1)
POINTWISE = _kind("conv2d", lambda f: f["groups"] == 1 and (f["kernel"] == 1 or f["channels"] == 3))


def _network(name: str) -> Callable[[Record], bool]:
    return _kind("network", lambda f: f["network"] == name)


def _named(kind: str, *parts: str) -> Callable[[Record], bool]:
    return lambda row: row["kind"] == kind and all(part in row["name"] for part in parts)


GOALS = (
    *(Goal("large GEMM, M = 128 and 512", LARGE, f"W{b}A8", VNNI_LIMIT, 0.92) for b in (8, 4, 2)),
    Goal("large GEMM, M = 128 and 512", LARGE, "W8A8", "W8", 1.0),
    Goal("large GEMM, M = 128 and 512", LARGE, "W4A8", "W4", 1.05),
    Goal("large GEMM, M = 128 and 512", LARGE, "W4A8", "qk W8A8", 0.97),
    Goal("large GEMM, M = 128 and 512", LARGE, "W2A8", "W2", 2.0),
    Goal("GEMM, M = 16", MIDDLE, "W8A8", "W8", 1.1),
    Goal("GEMM, M = 16", MIDDLE, "W4A8", "W4", 1.25),
    Goal("GEMM, M = 16", MIDDLE, "W2A8", "W2", 2.0),
    Goal("GEMM, M = 1, weights in cache", CACHED, "W8A8", "W8", 1.15),
    Goal("GEMM, M = 1, weights in cache", CACHED, "W4A8", "W4", 1.5),
    Goal("GEMM, M = 1, weights in cache", CACHED, "W2A8", "W2", 1.5),
    Goal("GEMM, M = 1, weights from memory", STREAMED, "W4A8", LIMIT, 0.85, 1),
    Goal("GEMM, M = 1, weights from memory", STREAMED, "W4A8", "W4", 1.2, 1),
    Goal("GEMM, M = 1, weights from memory", STREAMED, "W2A8", "W2", 1.4, 1),
    Goal("GEMM, M = 1, weights from memory", STREAMED, "W2A8", "qk W4A8", 1.7, 1),
    Goal("3x3 stride 1 of ResNet", DENSE_3X3, "W8A8", "W8", 1.0),
    Goal("3x3 stride 1 of ResNet", DENSE_3X3, "W4A8", "W8", 1.0),
    Goal("3x3 stride 1 of ResNet", DENSE_3X3, "W4A6", "W8", 1.6),
    Goal("3x3 stride 1 of ResNet", DENSE_3X3, "W4A4", "W8", 1.6),
    Goal("depthwise 3x3 of MobileNetV2", DEPTHWISE, "W8A8", ANY, 2.0),
    Goal("depthwise 3x3 of MobileNetV2", DEPTHWISE, "W4A8", ANY, 2.0),
    Goal("1x1, and the first layers", POINTWISE, "W8A8", ANY, 1.2),
    Goal("1x1, and the first layers", POINTWISE, "W4A8", ANY, 1.2),
    Goal("network resnet18", _network("resnet18"), "W4A8", "int8", 1.05),
    Goal("network resnet18", _network("resnet18"), "W4A6", "int8", 1.45),
    Goal("network resnet50", _network("resnet50"), "W4A8", "int8", 1.1),
    Goal("network resnet50", _network("resnet50"), "W4A6", "int8", 1.3),
    Goal("network mobilenet_v2", _network("mobilenet_v2"), "W4A8", "int8", 1.3),
    Goal("network minilm", _network("minilm"), "W4A8", "int8", 1.2),
    Goal("embedding bag, 4 bits", _kind("embedding_bag"), "W4", "W4", 1.4, 1),
    Goal("embedding bag, 4 bits", _kind("embedding_bag"), "W4", "W4", 1.5, 2),
    Goal("embedding bag, 2 bits", _kind("embedding_bag"), "W2", "W2", 1.8, 1),
    Goal("embedding bag, 2 bits", _kind("embedding_bag"), "W2", "W2", 3.0, 2),
    *(
        goal
        for op in ("lsq", "soft_round", "fisher_loss")
        for goal in (
            Goal(f"{op}, 1M values", _named("training", f"{op} 1M"), "ours", "torch.compile", 1.5),
            Goal(f"{op}, 1M values", _named("training", f"{op} 1M"), "ours", "eager torch", 10.0),
            Goal(f"{op}, 16M values", _named("training", f"{op} 16M"), "ours", "torch.compile", 1.0),
        )
    ),
    Goal("lsq, 1M values", _named("training", "lsq 1M"), "ours", "torch learnable", 10.0),
    Goal("start of resnet50 (load, pack for the kernels)", _named("start", "resnet50"), "load", "0.5 s", 1.0),
)


def standings(run: dict[str, Any], goals: tuple[Goal, ...] = GOALS) -> list[tuple[Goal, Standing | None]]:
    """Each goal that holds for the run's threads; None where nothing was measured for it. A run that measured products
    alone has no others."""
    held = [g for g in goals if g.threads in (None, run["threads"])]
    if run.get("products_only"):
        held = [g for g in held if g.ours not in WITHOUT_PRODUCTS]
    return [(g, _standing(g, run["rows"])) for g in held]


def _standing(goal: Goal, rows: list[Record]) -> Standing | None:
    ratios, mine_ms, rival_ms, limit_ms, names = [], [], [], [], Counter()
    for row in filter(goal.rows, rows):
        mine, rival = best(row, goal.ours, ours=True), _rival(goal, row)
        if mine is None or rival is None:
            continue
        name, ms = rival
        names[name] += 1
        ratios.append(ms / mine["ms"][1])
        mine_ms.append(mine["ms"][1])
        rival_ms.append(ms)
        limit_ms.append(mine.get("limit_ms"))
    if not ratios:
        return None
    return Standing(
        goal,
        len(ratios),
        mean(mine_ms),
        ", ".join(f"{name} ({n})" if len(names) > 1 else name for name, n in names.most_common(3)),
        mean(rival_ms),
        mean([ms for ms in limit_ms if ms]) if all(limit_ms) else None,
        mean(ratios),
        min(ratios),
    )


def _rival(goal: Goal, row: Record) -> tuple[str, float] | None:
    """Who ours are held against in a row, and its milliseconds."""
    if goal.against.endswith(" s"):
        return goal.against, 1e3 * float(goal.against.removesuffix(" s"))
    if goal.against in (LIMIT, VNNI_LIMIT):
        mine = best(row, goal.ours, ours=True)
        key = "limit_ms" if goal.against == LIMIT else "vnni_limit_ms"
        return (goal.against, mine[key]) if mine and key in mine else None
    if goal.against.startswith("qk "):
        found = best(row, goal.against.removeprefix("qk "), ours=True)
    else:
        found = best(row, None if goal.against == ANY else goal.against)
    return (found["name"], found["ms"][1]) if found else None


def best(row: Record, family: str | None, ours: bool = False) -> dict[str, Any] | None:
    """The fastest entry of a family (None: of any), ours or of the peers."""
    found = [e for e in row["entries"] if e["ours"] == ours and family in (None, e["family"])]
    return min(found, key=lambda e: e["ms"][1], default=None)


def mean(values: list[float]) -> float:
    """Geometric."""
    return exp(sum(map(log, values)) / len(values))
