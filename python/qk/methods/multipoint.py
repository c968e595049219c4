"""Multipoint quantization: the output channels that lose most become sums of two or three low-bit rows.

Source: Liu et al., Post-training Quantization with Multiple Points: Mixed Precision without Mixed Precision (2021).
Symbols of the paper: a row w is the sum of a_i w_i, each w_i in Q = {k / top, |k| <= top} with top = 2^(bits - 1) - 1.
Here codes are k and a step is a_i / top. Differences are in docs/methods/multipoint.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qk.calibrate.batches import call, hold
from qk.calibrate.moments import SecondMoments, second_moments
from qk.calibrate.objective import first_tensor, task_loss
from qk.calibrate.ranges import SMALLEST_STEP
from qk.errors import QkError, fail
from qk.inputs import evaluating
from qk.prepare.insert import QuantLayer
from qk.prepare.points import Tail
from qk.prepare.prepared import Prepared, check_calibrated, float_activations

STAGE = "qk.multipoint"
BUDGET = 0.1  # of the multiply-adds, where neither error nor budget says how far to go
GRID = 2000  # steps that the paper's search tries
TOGETHER = 2**20  # values that the searches hold at once
DEPENDENT = 1e-6  # of points' inner products, scaled to 1: what is below is taken for a dependence
JUDGED = 8  # batches on which layers are compared
SMALLEST_POWER = 1e-30
SMALLEST = 1e-3  # a fit leaves this part of a step at least

Search = Callable[[Tensor, int], Tensor]


# --- the mathematics: rows [N, K], float64 ----------------------------------------------------------------------------


def top_of(bits: int) -> int:
    """The largest code: 2^bits - 1 levels, 0 in their middle."""
    return 2 ** (bits - 1) - 1


def nearest(rows: Tensor, step: Tensor, bits: int) -> Tensor:
    """[w / a]: the nearest codes, clipped; 0 for a step of 0."""
    return (rows / step.where(step > 0, 1.0)[:, None]).round().clamp(-top_of(bits), top_of(bits))


def best_step(rows: Tensor, bits: int) -> Tensor:
    """The step [N] at which the nearest codes leave the least squared error; exact. 0 for a row of zeros.

    As the step falls, codes grow one by one, |w_j| passing from code m to m + 1 at |w_j| / (m + 1/2). Between two such
    steps the codes k are fixed and the best step is <|w|, k> / <k, k>, which takes <|w|, k>^2 / <k, k> off the error:
    both are running sums over the sorted steps. The largest gain of all pieces is that of the best step, wherever its
    piece ends: with its own nearest codes the error is not higher.
    """
    top = top_of(bits)
    steps = []
    for part in rows.abs().split(max(1, TOGETHER // max(1, top * rows.shape[1]))):
        middles = torch.arange(top, dtype=part.dtype, device=part.device) + 0.5
        order = (part[:, :, None] / middles).flatten(1).argsort(dim=1, descending=True)
        along = part.gather(1, order // top).cumsum(1)
        squares = (2 * (order % top) + 1).to(part.dtype).cumsum(1)  # (m + 1)^2 - m^2
        best = (along.square() / squares).argmax(1, keepdim=True)
        steps.append((along.gather(1, best) / squares.gather(1, best)).squeeze(1))
    return torch.cat(steps)


def grid_step(rows: Tensor, bits: int, count: int = GRID) -> Tensor:
    """The best of `count` steps [N] spread evenly up to the one at which every code is 0, as the paper searches."""
    shares = torch.arange(1, count + 1, dtype=rows.dtype, device=rows.device) / count
    farthest = 2 * rows.abs().amax(1)
    steps = []
    for row, end in zip(rows, farthest, strict=True):
        errors = [
            (row - step[:, None] * nearest(row, step, bits)).square().sum(1)
            for step in (end * shares).split(max(1, TOGETHER // max(1, len(row))))
        ]
        steps.append(end * shares[torch.cat(errors).argmin()])
    return torch.stack(steps)


SEARCHES: dict[str, Search] = {"exact": best_step, "grid": grid_step}


def decompose(rows: Tensor, bits: int, points: int, search: Search = best_step) -> tuple[Tensor, Tensor]:
    """Codes, int8 [points, N, K], and steps, float32 [points, N]: each point is what fits best what is left.

    Steps are rounded before codes are chosen, so that what is left accounts for it. Where nothing is left codes are 0
    and the step is 1.
    """
    codes, steps, left = [], [], rows.double()
    for _ in range(points):
        step = search(left, bits).float()
        nothing = step < SMALLEST_STEP
        step = step.masked_fill(nothing, 1.0)
        found = nearest(left, step.double(), bits).masked_fill(nothing[:, None], 0)
        left = left - step.double()[:, None] * found
        codes.append(found.to(torch.int8))
        steps.append(step)
    return torch.stack(codes), torch.stack(steps)


def left_after(rows: Tensor, codes: Tensor, steps: Tensor) -> Tensor:
    """[points + 1, N, K]: the rows, and what is left of them after each point."""
    left = [rows.double()]
    for code, step in zip(codes, steps, strict=True):
        left.append(left[-1] - step.double()[:, None] * code)
    return torch.stack(left)


def refit(products: Tensor, count: int) -> Tensor:
    """Factors [N, count] for the steps of the first `count` points with which their sum lies nearest to the row.

    products: [N, V, V], the inner products of left_after: those of weights, or of outputs. A point is the difference of
    two neighbours of left_after. Where a factor were not positive, or tiny, all of the channel's are 1.
    """
    inner = products[:, : count + 1, : count + 1]
    points = inner[:, :-1] - inner[:, 1:]  # each point with each of left_after
    among = points[:, :, :-1] - points[:, :, 1:]
    size = among.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    size = size.where(size > 0, 1.0)
    scaled = among / (size[:, :, None] * size[:, None])
    change = torch.linalg.pinv(scaled, rtol=DEPENDENT, hermitian=True) @ (points[:, :, -1:] / size[:, :, None])
    factors = 1 + change.squeeze(2) / size
    return factors.where((factors > SMALLEST).all(1, keepdim=True), 1.0)


def error_of(products: Tensor, factors: Tensor) -> Tensor:
    """[N]: the squared length of what is left after the first points with their steps times the factors [N, count]."""
    count = factors.shape[1]
    share = torch.zeros_like(products[:, : count + 1, 0])  # of each of left_after in what is left
    share[:, -1] = 1
    share[:, :-1] -= factors - 1
    share[:, 1:] += factors - 1
    inner = products[:, : count + 1, : count + 1]
    return (share[:, None] @ inner @ share[:, :, None]).flatten().clamp(min=0)


# --- which channels ---------------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The points of a layer's channels, as many as a channel may have.

    codes: int8 [points, N, K]. steps: float32 [points, points, N]; steps[n - 1, i] is that of point i where a channel
    has n. errors: float64 [points, N], the mean squared error of the output with n; power: [N], its mean square.
    """

    codes: Tensor
    steps: Tensor
    errors: Tensor
    power: Tensor


def candidates(
    rows: Tensor, bits: int, points: int, moments: SecondMoments, search: Search = best_step, fit: str = "outputs"
) -> Candidates:
    """fit: steps are fitted again, together, to the "weights", to the "outputs", or not ("none")."""
    codes, steps = decompose(rows, bits, points, search)
    parts = max(1, TOGETHER // ((points + 1) * rows.shape[1])) if moments.groups == 1 else len(rows)
    outputs, weights = [], []
    for i in range(0, len(rows), parts):
        left = left_after(rows[i : i + parts], codes[:, i : i + parts], steps[:, i : i + parts])
        outputs.append(moments.between(left))
        weights.append(left.transpose(0, 1) @ left.permute(1, 2, 0))
    outputs, weights = torch.cat(outputs), torch.cat(weights)
    fitted, errors = torch.ones(points, points, len(rows), dtype=torch.float64, device=rows.device), []
    for n in range(1, points + 1):
        if fit != "none":
            fitted[n - 1, :n] = refit(outputs if fit == "outputs" else weights, n).T
        errors.append(error_of(outputs, fitted[n - 1, :n].T))
    return Candidates(codes, (steps * fitted).float(), torch.stack(errors), outputs[:, 0, 0])


def spread(
    layers: list[Candidates],
    costs: list[float],
    weights: list[float],
    error: float | None = None,
    budget: float = math.inf,
) -> list[Tensor]:
    """How many points each channel of each layer gets, int64 [N]: by what a row takes off the error for its cost.

    costs: of a row, by layer. weights: of a layer's errors beside those of others. error: channels at or below this
    part of their own output's mean square get no more. budget: what all rows added may cost.
    """
    counts = [torch.ones(len(layer.power), dtype=torch.int64) for layer in layers]
    errors = [layer.errors.cpu() for layer in layers]
    gains = [-e.diff(dim=0) * weight for e, weight in zip(errors, weights, strict=True)]
    wanted = [e[:-1] > (error or 0) * layer.power.cpu() for e, layer in zip(errors, layers, strict=True)]
    worth = [(g / cost).where(w & (g > 0), 0).T.tolist() for g, w, cost in zip(gains, wanted, costs, strict=True)]
    queue = [
        (-row[0], i, c) for i, of_layer in enumerate(worth) for c, row in enumerate(of_layer) if row and row[0] > 0
    ]
    heapq.heapify(queue)
    while queue:
        _, i, channel = heapq.heappop(queue)
        if costs[i] > budget:
            continue
        budget -= costs[i]
        counts[i][channel] += 1
        more = worth[i][channel][counts[i][channel] - 1 :]
        if more and more[0] > 0:
            heapq.heappush(queue, (-more[0], i, channel))
    return counts


# --- the stage --------------------------------------------------------------------------------------------------------


def place(layer: QuantLayer, found: Candidates, counts: Tensor) -> None:
    """Gives the layer the first counts[c] points of each channel c."""
    counts = counts.to(found.codes.device)
    codes = (found.codes.to(torch.int16) + 2 ** (layer.spec.weights - 1)).to(torch.uint8)
    steps = found.steps[counts - 1, :, torch.arange(len(counts), device=counts.device)].T
    owners = [(counts > i).nonzero().flatten() for i in range(1, len(codes))]
    tail = Tail(
        torch.cat([codes[i + 1, of] for i, of in enumerate(owners)]),
        torch.cat([steps[i + 1, of] for i, of in enumerate(owners)]),
        torch.cat(owners),
    )
    layer.set_weight_points(codes[0], steps[0], tail if len(tail.owners) else None)


def costs_of(p: Prepared, names: list[str], cost: str) -> list[float]:
    """Of one more row in each layer, as a part of what all rows of these layers cost."""

    def shares(whole: list[int]) -> list[float]:
        return [w / rows / sum(whole) for w, rows in zip(whole, found["rows"], strict=True)]

    layers = [p.layers[name] for name in names]
    found = {"rows": [layer.weight_shape[0] for layer in layers], "macs": [layer.macs for layer in layers]}
    if cost != "both":
        return shares(found[cost])
    weights = [math.prod(layer.weight_shape) for layer in layers]
    return [(a + b) / 2 for a, b in zip(shares(found["macs"]), shares(weights), strict=True)]


def by_power(layers: Iterable[Candidates]) -> list[float]:
    """Weights of layers' errors: a layer's count as parts of its output's mean square."""
    return [1 / max(float(layer.power.sum()), SMALLEST_POWER) for layer in layers]


def by_loss(p: Prepared, found: Mapping[str, Candidates], batches: list) -> list[float]:
    """Weights of layers' errors: by how much the task's loss rises for a layer's error, where its weights alone have
    one point a channel and everything else is float. Leaves one point in every channel.

    Raises QkError where the model's output has no fixed shape.
    """
    with p.quantized(set()):
        expected = [first_tensor(call(p, batch, i, STAGE)) for i, batch in enumerate(batches)]
    weights = []
    for name, layer in found.items():
        place(p.quant_layers()[name], layer, torch.ones(len(layer.power), dtype=torch.int64))
        with p.quantized({name}), float_activations(p):
            outputs = [first_tensor(call(p, batch, i, STAGE)) for i, batch in enumerate(batches)]
        loss = sum(float(task_loss(*three)) for three in zip(outputs, expected, batches, strict=True))
        weights.append(loss / max(float(layer.errors[0].sum()), SMALLEST_POWER))
    return weights


@torch.no_grad()
def multipoint(
    p: Prepared,
    batches: Iterable,
    *,
    error: float | None = None,
    budget: float | None = None,
    cost: str = "both",
    inputs: str = "float",
    search: str = "exact",
    fit: str = "outputs",
    compare: str = "loss",
    max_batches: int | None = None,
    memory_mb: int = 1024,
) -> None:
    """Gives output channels of p's layers a second and third row of codes where that lowers the output's error most.

    For layers whose spec has points above 1 (Recipe.points), in place, between calibrate and reconstruct: what was
    learned, and corrected biases, are gone. Zeros become the middle code, steps of weights those of the decomposition;
    every channel keeps at least one row. batches, max_batches, memory_mb: as for reconstruct; second moments of the
    inputs take at most memory_mb, of as many layers at a time as fit.
    error: channels get points while the mean squared error of their output is above this part of its mean square.
    budget: at most this part more of what `cost` says: "macs", "rows", or "both" multiply-adds and weights, half each.
    It is spent where the error falls most for the cost.
    Neither error nor budget: a budget of 0.1. Both: until either says stop.
    inputs: of the layers, from the "float" model or the one "quantized" as p is now. search: of a point's step, "exact"
    or the paper's "grid". fit: once a channel has its points their steps are fitted together, to its "outputs", to its
    "weights" or, as in the paper, not ("none"). compare: errors of layers, by how much the "loss" of the task rises
    with them, on the first batches, or by "power", as parts of the layer's mean square; "loss" is that too where the
    model's output has no fixed shape.
    Raises QkError for p that is not calibrated or has no such layer, and bad batches; p is unchanged then.
    """
    check_calibrated(p, STAGE)
    given = {"cost": cost, "inputs": inputs, "search": search, "fit": fit, "compare": compare}
    for name, allowed in CHOICES.items():
        if given[name] not in allowed:
            raise fail(STAGE, name, f"one of {', '.join(allowed)}", repr(given[name]))
    for name, value in (("error", error), ("budget", budget)):
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise fail(STAGE, name, "a number above 0, or None", repr(value))
    layers = {name: layer for name, layer in p.quant_layers().items() if layer.spec.points > 1}
    if not layers:
        advice = "Prepare with Recipe(points=3) and weights of 2 to 4 bits."
        raise fail(STAGE, "p", "a model with a layer of several points", "1 point for every layer", advice)
    held = hold(batches, STAGE, max_batches, memory_mb)
    found = {}
    for name, moments in second_moments(p, list(layers), held, STAGE, memory_mb, inputs == "quantized"):
        layer = layers[name]
        spec = layer.spec
        found[name] = candidates(layer.weight_rows(), spec.weights, spec.points, moments, SEARCHES[search], fit)
    if budget is None:
        budget = BUDGET if error is None else math.inf
    weights = by_power(found.values())
    if compare == "loss":
        with suppress(QkError), evaluating(p.model):
            weights = by_loss(p, found, held[:JUDGED])
    counts = spread(list(found.values()), costs_of(p, list(layers), cost), weights, error, budget)
    for (name, candidate), count in zip(found.items(), counts, strict=True):
        place(layers[name], candidate, count)
    p.history = {}


CHOICES = {
    "cost": ("both", "macs", "rows"),
    "inputs": ("float", "quantized"),
    "search": tuple(SEARCHES),
    "fit": ("outputs", "weights", "none"),
    "compare": ("loss", "power"),
}


@dataclass(frozen=True)
class Overhead:
    """What points cost in the layers that may have several. rows: without the extra ones. extra_macs: part of theirs.
    bits: of a weight, extra rows included, on average."""

    rows: int
    extra_rows: int
    extra_macs: float
    bits: float


def overhead(p: Prepared) -> Overhead | None:
    """None where every layer has one point."""
    layers = {name: layer for name, layer in p.quant_layers().items() if layer.spec.points > 1}
    if not layers:
        return None
    sizes = {name: (len(layer.weight), layer.extra_rows, layer.spec.weights) for name, layer in layers.items()}
    macs = sum(p.layers[name].macs for name in layers)
    extra = sum(p.layers[name].macs * more / n for name, (n, more, _) in sizes.items())
    weights = sum(layer.weight.numel() for layer in layers.values())
    bits = sum(layers[name].weight.numel() * b * (n + more) / n for name, (n, more, b) in sizes.items())
    rows, more = sum(n for n, _, _ in sizes.values()), sum(m for _, m, _ in sizes.values())
    return Overhead(rows, more, extra / macs, bits / weights)
