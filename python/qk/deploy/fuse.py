"""fuse: from an integer model to one whose activations stay in codes between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from qk import ops
from qk.deploy.embedding import table_modules
from qk.deploy.fusing.graph import Constants, finished, merge_equal
from qk.deploy.fusing.heads import has_attention, join_heads
from qk.deploy.fusing.leftovers import left_in_float, note_reasons
from qk.deploy.fusing.model import ExpectedTensor, FusedModel, Inputs
from qk.deploy.fusing.regions import build_regions
from qk.deploy.fusing.rewrite import fuse_exactly, read_images_as_they_lie
from qk.deploy.fusing.running import note_shapes
from qk.deploy.fusing.tensors import quantize_tensors
from qk.deploy.fusing.trace import canonical, expected_inputs, traced, two
from qk.deploy.modules import IntegerLayer, integer_layers
from qk.deploy.tune import ALGORITHMS, tuned
from qk.errors import fail
from qk.inputs import KINDS, bad_values, describe, device_of, feed, map_tensors, resized, tensors_in

__all__ = ["FusedModel", "fuse", "unfused"]

STAGE = "qk.fuse"
RANGES = ("minmax", "percentile")
Rows = Callable[[fx.Node], tuple[Tensor, Tensor, int] | None]  # of a gemm: codes, zeros and bits of its weight


def fuse(
    model: nn.Module,
    example: Any,
    *,
    tensors: int | None = 8,
    ranges: str = "minmax",
    algorithm: str | None = None,
) -> FusedModel:
    """A copy of an integer model in which activations stay in codes between layers; `model` stays as it is.

    model: from qk.convert, qk.quantize or qk.load, on the CPU. example: a batch (tensor, tuple of positional arguments
    or dict of keywords), or a list of batches. The sizes of the first are those that the result takes; only the batch,
    and the length of sequences, may differ.
    tensors: 8 also quantizes what integer layers hand to each other (skip connections, inputs of pools and of
    activation functions, gates, concatenations); None changes no bit of the model's results and fuses what it can so.
    ranges: of these tensors over all batches given: "minmax" clips nothing, "percentile" keeps 99.99 %. Where a layer
    with 8-bit inputs reads the tensor, its step is taken.
    algorithm: of convolutions, "direct" or "winograd" where it applies; None takes what is faster here, on the sizes of
    the first batch with the threads of now (qk.deploy.tune_kernels). Results do not depend on it.
    The result equals `unfused(...)` with the same arguments bit for bit (docs/fuse.md).
    Raises QkError for a model without an integer layer, one that torch.export cannot follow, and a batch that the model
    does not take.
    """
    batches = _checked(model, example, tensors, ranges)
    if algorithm not in (None, *ALGORITHMS):
        raise fail(STAGE, "algorithm", f"one of {', '.join(ALGORITHMS)}, or None", repr(algorithm))
    model = tuned(model, batches[0], algorithm)
    return _fused(_quantized(model, batches, tensors, ranges), model, batches[0], lambda node: _rows(model, node))


def fuse_network(network: nn.Module, example: Any, rows: dict[str, tuple[Tensor, Tensor, int]]) -> FusedModel:
    """The second, exact pass alone, for a network of torch.ops.qk that lies between float and float as it should: what
    `fuse` makes of an integer model after its first pass, or qk.hago's. rows: of weights of gemm, by the names that the
    network has for them, codes [N, K], zeros and bits."""
    constants = canonical(traced(network, example))
    merge_equal(constants.graph)
    note_shapes(constants, example)
    return _fused(constants, network, example, lambda node: rows.get(node.kwargs["weight"].target))


def _fused(constants: Constants, model: nn.Module, example: Any, rows: Rows) -> FusedModel:
    """model: what the graph was traced from."""
    graph = constants.graph
    fuse_exactly(constants)
    read_images_as_they_lie(graph, _repacked(rows, constants))
    regions = build_regions(constants)
    report = left_in_float(graph)
    check_inputs(constants.root, graph)
    fused = FusedModel(finished(constants), regions, report)
    _free_batch(fused, model, example)
    return fused


def unfused(model: nn.Module, example: Any, *, tensors: int | None = 8, ranges: str = "minmax") -> fx.GraphModule:
    """What `fuse` computes, one operator after the other: the integer network that fusing must not change a bit of."""
    return finished(_quantized(model, _checked(model, example, tensors, ranges), tensors, ranges))


def _quantized(model: nn.Module, batches: list[Any], tensors: int | None, ranges: str) -> Constants:
    constants = canonical(traced(model, batches[0]))
    merge_equal(constants.graph)
    if tensors is not None and has_attention(constants.graph):
        note_shapes(constants, map_tensors(two, batches[0]))
        join_heads(constants.graph)
    note_shapes(constants, batches[0])
    note_reasons(constants.graph, model, tensors)
    if tensors is not None:
        quantize_tensors(constants, batches, ranges)
    return constants


def _checked(model: nn.Module, example: Any, tensors: int | None, ranges: str) -> list[Any]:
    """The batches, each of which the model has run."""
    if not isinstance(model, nn.Module):
        raise fail(STAGE, "model", "an nn.Module", type(model).__name__)
    if isinstance(model, FusedModel):
        raise fail(STAGE, "model", "an unfused integer model", "a fused one")
    if not integer_layers(model):
        advice = "Make one with qk.quantize(model, batches).model, or qk.prepare, qk.calibrate and qk.convert."
        rest = f"no integer layer beside {len(tables)} tables" if (tables := table_modules(model)) else "all in float"
        raise fail(STAGE, "model", "one with an integer layer", f"{type(model).__name__}, {rest}", advice)
    if tensors not in (None, 8):
        raise fail(STAGE, "tensors", "8 or None", repr(tensors))
    if ranges not in RANGES:
        raise fail(STAGE, "ranges", f"one of {', '.join(RANGES)}", repr(ranges))
    batches = list(example) if isinstance(example, list) else [example]
    if not batches:
        raise fail(STAGE, "example", "a batch or a list of batches", "an empty list")
    device = device_of(model)
    for i, batch in enumerate(batches):
        if not isinstance(batch, KINDS) or next(tensors_in(batch), None) is None:
            raise fail(STAGE, f"batch {i} of example", "a tensor, tuple or dict of tensors", describe(batch))
        if any(map(bad_values, tensors_in(batch))):
            raise fail(STAGE, f"batch {i} of example", "finite", "NaN or infinity in it")
        batches[i] = map_tensors(lambda x: x.detach().to(device), batch)
        if kinds(batches[i]) != kinds(batches[0]):
            raise fail(STAGE, f"batch {i} of example", f"like the first, {describe(batches[0])}", describe(batch))
    _run(model, batches[0])
    return batches


def kinds(batch: Any) -> tuple[Any, list[tuple[torch.dtype, int, torch.Size]]]:
    """How tensors are nested, their types, ranks and sizes, but for the batch and the length of sequences."""
    return tree_flatten(batch)[1], [(x.dtype, x.dim(), x.shape[1 if x.dim() > 3 else 2 :]) for x in tensors_in(batch)]


def _run(model: nn.Module, batch: Any) -> None:
    try:
        with torch.no_grad():
            feed(model, batch)
    except Exception as error:
        got = f"{describe(batch)}, on which it raised {type(error).__name__}: {error}"
        raise fail(STAGE, "example", "input that the model accepts", got) from error


def _repacked(rows: Rows, constants: Constants) -> Any:
    """A function that makes the weight of a gemm whose columns go over [C, H, W] into one over [H, W, C]."""

    def repacked(node: fx.Node, image: tuple[int, int, int]) -> fx.Node | None:
        found = rows(node)
        if found is None:
            return None
        (codes, zero, bits), (height, width, channels) = found, image
        turned = codes.reshape(-1, channels, height, width).permute(0, 2, 3, 1).reshape(codes.shape)
        return constants.add("weight", ops.prepack(ops.pack(turned.contiguous(), bits), zero, bits, tuple(codes.shape)))

    return repacked


def _rows(model: nn.Module, node: fx.Node) -> tuple[Tensor, Tensor, int] | None:
    """Codes, zeros and bits of a layer; None where columns must stay: groups along K are of neighbours, and a tail
    reads the same columns."""
    try:
        layer = model.get_submodule(node.meta.get("module", ""))
    except AttributeError:
        return None
    if not isinstance(layer, IntegerLayer) or layer.weight_step.dim() != 1 or layer.tail_owners is not None:
        return None
    return layer.weight_codes(), layer.weight_zero, layer.bits


def _free_batch(fused: FusedModel, model: nn.Module, example: Any) -> None:
    """A model that asks for len(x) is traced for one batch. Where one more row changes none of the others, neither in
    the model nor in what it became, any batch is taken."""
    inputs = fused.body.inputs
    made_for = inputs.expected
    rows = {x.shape[0] for x in tensors_in(example) if x.dim()}
    fixed = {next(iter(x.sizes), None) for x in made_for if isinstance(x, ExpectedTensor)}
    if len(rows) != 1 or fixed != rows:
        return
    count = rows.pop()
    both = [example, resized(example, count + 1)]
    try:
        few, more = (_outputs(model, x) for x in both)
    except Exception:  # a first axis of which the model takes one size is no batch
        return
    inputs.expected = [x._replace(sizes=(None, *x.sizes[1:])) if isinstance(x, ExpectedTensor) else x for x in made_for]
    try:
        same = _same_rows(few, more) and _same_rows(*(_outputs(fused, x) for x in both))
    except Exception:
        same = False
    if not same:
        inputs.expected, fused.batch = made_for, count


def _outputs(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(tensors_in(feed(model, batch)))


def _same_rows(few: list[torch.Tensor], more: list[torch.Tensor]) -> bool:
    """Whether the second ones are the first ones with a row more."""
    pairs = zip(few, more, strict=True)
    return all(len(m) == len(f) + 1 and torch.equal(m[: len(f)], f) for f, m in pairs)


def check_inputs(root: nn.Module, graph: fx.Graph) -> None:
    """The first thing that the graph does."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    root.add_submodule("inputs", Inputs(expected_inputs(graph)))
    with graph.inserting_after(placeholders[-1]):
        graph.call_module("inputs", tuple(placeholders))
