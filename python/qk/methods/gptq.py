"""GPTQ: round the columns of a weight one after the other; what a column loses, those that follow make up for.

Source: Frantar et al., OPTQ: Accurate Quantization for Generative Pre-trained Transformers (2022), sections 3 and 4.
Symbols of the paper: H is `hessian`, the Cholesky factor of its inverse `factor`, B is BLOCK. Differences are in
docs/methods/gptq.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qk import ops
from qk.calibrate.batches import Stop, call, hold, unpadded
from qk.calibrate.moments import patches
from qk.errors import fail
from qk.inputs import device_of
from qk.methods.cache import Call, Room
from qk.methods.engine import frozen, units_of, watch
from qk.methods.lsq import LsqLayer
from qk.methods.resume import Finished, run_of, steps_digest
from qk.prepare.insert import QuantLayer, to_kernel_order
from qk.prepare.prepared import Prepared, Unit, check_learnable
from qk.progress import Progress
from qk.spec import Recipe, checked_recipe

STAGE = "qk.gptq"
DAMPING = 0.01  # of the mean of the diagonal, added to it
BLOCK = 128  # columns whose errors reach the rest of the row in one product
LONGEST = 8192  # columns that are solved together; a longer row is cut, and its parts do not know of each other


# --- the mathematics; G groups of a convolution (1 for any other layer), N rows and K columns of each -----------------


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped hessian. [G, K, K], float64, both.

    Of H = R R^T with R upper triangular, which is Cholesky's factor from the last column to the first, U is R^-1: one
    factorization, and the inverse itself is never formed. A column without input (0 on the diagonal) has the damping
    alone, so it neither gives nor takes errors.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    damped = hessian + torch.diag_embed((damping * mean).where(mean > 0, 1.0).expand_as(diagonal))
    r = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    eye = torch.eye(r.shape[1], dtype=r.dtype, device=r.device).expand_as(r)
    return torch.linalg.solve_triangular(r, eye, upper=True)


def round_columns(weight: Tensor, factor: Tensor, step: Tensor, zero: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    """Codes, uint8: column by column to the nearest, with (w - q) / U_ii times row i of U taken off what follows.

    weight: [G, N, K], float64; factor: [G, K, K]; step, zero: [G, N, K], float32: of each weight.
    Errors reach the next columns of a block at once and those behind it in one product when the block is done.
    """
    weight = weight.mT.clone(memory_format=torch.contiguous_format)  # a column lies in one piece
    step, zero = step.mT.contiguous(), zero.mT.contiguous()
    codes, errors = torch.empty_like(step), torch.empty_like(weight)
    per_step, top, columns = 1.0 / step, 2**bits - 1, weight.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        for i in range(start, end):
            w = weight[:, i]
            codes[:, i] = (torch.round(w.float() * per_step[:, i]) + zero[:, i]).clamp(0, top)  # as ops.quantize
            q = (codes[:, i] - zero[:, i]) * step[:, i]
            errors[:, i] = (w - q) / factor[:, i, i, None]
            weight[:, i + 1 : end] -= factor[:, i, i + 1 : end, None] * errors[:, None, i]
        weight[:, end:] -= factor[:, start:end, end:].mT @ errors[:, start:end]
    return codes.mT.to(torch.uint8)


def solve(weight: Tensor, hessian: Tensor, step: Tensor, zero: Tensor, bits: int, act_order: bool) -> Tensor:
    """Codes of weight [G, N, K] that keep tr(dW H dW^T) low. hessian: [G, K, K]; step, zero: [G, N, K].

    act_order: columns of large inputs first, while all others can still make up for them.
    """
    if not act_order:
        return round_columns(weight, inverse_factor(hessian), step, zero, bits)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None].expand_as(weight)
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    weight, step, zero = (t.gather(2, columns) for t in (weight, step, zero))
    codes = round_columns(weight, inverse_factor(hessian), step, zero, bits)
    return torch.empty_like(codes).scatter_(2, columns, codes)


def row_losses(change: Tensor, hessian: Tensor) -> Tensor:
    """[G, N]: of each row of change [G, N, K] its share of tr(dW H dW^T)."""
    return ((change @ hessian) * change).sum(-1)


# --- inputs of a layer ------------------------------------------------------------------------------------------------


class Moments:
    """Sums of x x^T over positions, in parts of at most LONGEST columns: float32 products, added in float64.

    The paper's H is twice that; no code depends on the factor. Divided by the positions, tr(dW H dW^T) is the mean
    squared change of the output, summed over channels. read: what they are the moments of, as _read says.
    """

    def __init__(self, layer: QuantLayer, read: tuple = ()) -> None:
        self.layer, self.positions, self.read = layer, 0, read
        groups, columns = (layer.conv_args or {}).get("groups", 1), layer.weight[0].numel()
        self.spans = [slice(i, min(i + LONGEST, columns)) for i in range(0, columns, LONGEST)]
        self.parts = [
            torch.zeros(groups, s.stop - s.start, s.stop - s.start, dtype=torch.float64, device=layer.weight.device)
            for s in self.spans
        ]

    def add(self, x: Tensor) -> None:
        """x: an input of the layer."""
        for found in patches(self.layer, x):
            self.positions += found.shape[1]
            for part, rows in zip(self.parts, found.split([len(part[0]) for part in self.parts], dim=2), strict=True):
                part += rows.mT @ rows

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(part).all()) for part in self.parts)


def round_layer(layer: QuantLayer, moments: Moments, act_order: bool) -> tuple[Tensor, float, float]:
    """Codes, and the loss with nearest rounding and with them; a row for which nearest is better keeps it.

    Of channels with several points it is the last that is chosen; what the others sum to is taken off the weight.
    """
    bits, groups, fixed = layer.spec.weights, moments.parts[0].shape[0], layer.fixed_weight()
    as_groups = lambda t: t.reshape(groups, t.shape[0] // groups, -1)  # noqa: E731
    weight = to_kernel_order(layer.weight.detach() if fixed is None else layer.weight.detach() - fixed)
    nearest = as_groups(ops.quantize(weight, layer.last_step, layer.weight_zero, bits))
    weight = as_groups(weight)
    repeats = weight.shape[-1] // layer.groups_along_k
    step, zero = (as_groups(t).repeat_interleave(repeats, -1) for t in (layer.last_step, layer.weight_zero))
    zero, weight = zero.float(), weight.double()

    def losses(codes: Tensor) -> Tensor:
        change = (codes.float() - zero) * step - weight
        parts = zip(moments.spans, moments.parts, strict=True)
        return sum(row_losses(change[..., span], part) for span, part in parts) / moments.positions

    solved = torch.empty_like(nearest)
    for span, part in zip(moments.spans, moments.parts, strict=True):
        w, s, z = (t[..., span] for t in (weight, step, zero))
        solved[..., span] = solve(w, part, s, z, bits, act_order)
    before, after = losses(nearest), losses(solved)
    better = after < before
    codes = torch.where(better[..., None], solved, nearest).reshape(layer.codes.shape)
    return codes, float(before.sum()), float(torch.where(better, after, before).sum())


# --- the loop ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gptq(
    p: Prepared,
    batches: Iterable,
    recipe: Recipe | None = None,
    *,
    progress: str = "auto",
    max_batches: int | None = None,
    folder: str | Path | None = None,
) -> None:
    """Chooses the codes of p's weights by GPTQ, in place, layer by layer in running order. Steps stay as calibrated.

    batches: as for calibrate; what is not a list is read once and held. recipe: act_order, prefix, memory_mb.
    progress: "auto", "bar", "lines" or "off". Memory beside the batches: of one layer about 4 matrices of K x K float64
    for each group of a convolution.
    p.history[layer] gets "before" with nearest rounding, "after", and what was "kept": "learned", or "nearest" where no
    row gained. Losses are the mean squared error of the output that the weights make, summed over channels.
    folder: as for reconstruct: finished layers lie there, and a run that was killed goes on to the same bits.
    Raises QkError for p that is not calibrated, in training, or with pairs by sparse weights, for bad batches, and for
    a folder that holds another run's layers.
    """
    check_learnable(p, STAGE)
    recipe = checked_recipe(recipe, STAGE)
    for name, layer in p.quant_layers().items():
        if reason := _against(layer):
            raise fail(STAGE, "p", "with layers whose rounding alone is to be chosen", f"{name}, {reason}")
    held = hold(batches, STAGE, max_batches, recipe.memory_mb)
    units, layers = units_of(p, "layer"), p.quant_layers()
    p.learned_in = run_of(p, units, held, recipe, steps_digest(p))
    kept = None if folder is None else Finished(folder, p, units, p.learned_in, STAGE)
    p.history = {}
    block_of = {name: block for block in p.units for name in block.layers}
    finished = set(p.tables)
    moments: Moments | None = None
    runs: Runs | None = None
    with frozen(p.model), Progress(progress, STAGE, len(units), len(units)) as shown:
        for number, unit in enumerate(units):
            name = unit.name
            shown.unit(name)
            if not (kept and kept.restore(number)):
                layer, prefix = layers[name], finished if recipe.prefix == "quantized" else None
                if runs is None or runs.block != block_of[name]:
                    runs = None  # one at a time, as moments
                    runs = Runs(p, block_of[name], prefix, held, recipe.memory_mb)
                if moments is None or _read(p, name) != moments.read:
                    moments = None
                    moments = moments_of(runs, name)
                layer.last_codes, before, after = round_layer(layer, moments, recipe.act_order)
                p.history[name] = _history(before, after)
                if kept:
                    kept.add(number)
            last = p.history[name][-1]
            shown.end(1, last["before"], last["after"], last["kept"])
            finished.add(name)


def _read(p: Prepared, name: str) -> tuple:
    """Equal for layers whose inputs have the same moments: they read one tensor in the same way, as queries, keys and
    values do."""
    layer = p.quant_layers()[name]
    link = next((link for link in p.links if name in link), (name,))
    # A layer that runs twice links the readers of two tensors.
    alone = layer.input_scale is not None or any(p.layers[member].calls > 1 for member in link)
    return (name,) if alone else (link, layer.spec.dynamic, layer.conv_args, layer.weight.shape[1:])


def _against(layer: QuantLayer) -> str:
    """Why no codes can be chosen for this layer; "" if they can."""
    if isinstance(layer, LsqLayer):
        return "which is in training"
    if layer.spec.sparq is not None and layer.spec.sparq.pairs == "weights":
        return "whose weights are sparse, which errors handed on would fill"
    return ""


class Runs:
    """The batches, run as far as a layer of the block: of one with several layers from the block's inputs on, which are
    kept for all of them. prefix: what is quantized, to which layers of the block may be added meanwhile; None: nothing.
    memory_mb: of the inputs; what is beyond goes to a file."""

    def __init__(self, p: Prepared, block: Unit, prefix: set[str] | None, batches: list, memory_mb: int = 1024) -> None:
        self.p, self.block, self.prefix, self.batches = p, block, prefix, batches
        self.inputs: list[Call] | None = None
        if len(block.layers) > 1:
            room = Room(memory_mb)
            with p.quantized(prefix or set()):
                self.inputs = [self._input(index, room) for index in range(len(batches))]

    def _input(self, index: int, room: Room) -> Call:
        found = watch(self.p, self.block, self.batches[index], index, inputs_only=True, stage=STAGE)[0]
        return replace(found, leaves=[room.hold(x) if isinstance(x, Tensor) else x for x in found.leaves])

    def run(self, index: int) -> None:
        """One batch, until a hook raises Stop."""
        with suppress(Stop):
            if self.inputs is None:
                call(self.p, self.batches[index], index, STAGE)
            else:
                args, kwargs = self.inputs[index].again(device_of(self.p.model))
                self.block.modules(self.p.model)[0](*args, **kwargs)


def moments_of(runs: Runs, name: str) -> Moments:
    """Of a layer's input: quantized as the layer does, or the float model's where the runs have no prefix."""
    p, prefix = runs.p, runs.prefix
    layer = p.quant_layers()[name]
    moments, once, batch = Moments(layer, _read(p, name)), p.layers[name].calls == 1, None

    def see(_: QuantLayer, args: tuple, kwargs: dict, __: Tensor) -> None:  # the layer ran, so the input fits it
        x = layer.taken(*args, **kwargs)
        moments.add(unpadded(batch, x if prefix is None else layer.input(x)))
        if once:
            raise Stop

    handle = layer.register_forward_hook(see, with_kwargs=True)
    try:
        with p.quantized(prefix or set()):
            for index in range(len(runs.batches)):
                batch = runs.batches[index]
                runs.run(index)
    finally:
        handle.remove()
    if not moments.positions:
        raise fail(STAGE, "batches", f"data that reaches {name}", "none that does")
    if not moments.is_finite():
        raise fail(STAGE, f"the input of {name or 'the model'}", "finite", "NaN or infinity")
    return moments


def _history(before: float, after: float) -> list[dict]:
    """As of reconstruct: a curve, here of two points, and what was kept."""
    points = [{"iteration": 0, "loss": before}, {"iteration": 1, "loss": after}]
    kept = "learned" if after < before else "nearest"
    return [*points, {"iteration": 1, "loss": after, "before": before, "after": after, "kept": kept}]
