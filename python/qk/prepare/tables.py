"""Which embedding tables can be quantized, and why the others cannot."""

from __future__ import annotations

import torch
from torch import nn

from qk.errors import fail
from qk.ops.embedding_bag import row_bytes
from qk.options import Embeddings
from qk.prepare.lookup import kind_of
from qk.prepare.observe import Observation
from qk.prepare.plan import check_patterns
from qk.prepare.source import STAGE
from qk.prepare.support import COMPUTED, HOOKED, IDLE, SHARED, Uses, check_finite, is_computed
from qk.prepare.tree import has_hooks
from qk.spec import SKIPPED, Recipe


def find_tables(model: nn.Module, seen: Observation, recipe: Recipe) -> tuple[dict[str, Embeddings], dict[str, str]]:
    """How each table is quantized that the recipe asks for, in running order, and for every other one the reason.

    Raises QkError where embeddings are asked for and the model has none, and for a table with a NaN or infinity.
    """
    there = {name: module for name, module in model.named_modules() if kind_of(module)}
    if recipe.embeddings is None:
        return {}, dict.fromkeys(there, "the recipe leaves embedding tables in float")
    if not there:
        raise fail(STAGE, "recipe.embeddings", "null for a model without an Embedding or EmbeddingBag", "a width")
    check_patterns("embeddings.overrides", recipe.embeddings.overrides, there, "tables")
    uses, started = Uses(model, seen), {name: order for order, name in enumerate(seen.calls)}
    tables: dict[str, Embeddings] = {}
    reasons: dict[str, str] = {}
    for name in sorted(there, key=lambda name: started.get(name, len(started))):
        spec = recipe.embeddings.for_table(name)
        reason = SKIPPED if recipe.skips(name) else _against(there[name], name, spec, uses, seen)
        if reason:
            reasons[name] = reason
        else:
            check_finite(name, weight=there[name].weight)
            tables[name] = spec
    return tables, reasons


def _against(module: nn.Module, name: str, spec: Embeddings, uses: Uses, seen: Observation) -> str:
    """Why this table stays in float; "" if it can be quantized."""
    kind = kind_of(module)
    if is_computed(module):
        return COMPUTED
    if "forward" in vars(module) or type(module).forward is not kind.forward:
        return f"{type(module).__name__} has its own forward"
    if set(module._parameters) != {"weight"} or module._buffers or module._modules:
        return "it holds more than a weight"
    weight = module.weight
    if weight.numel() == 0:
        return "it has no weights"
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    if module.max_norm is not None:
        return "max_norm changes its rows as they are looked up"
    if uses.is_shared(weight):
        return SHARED
    if reason := uses.by_others(weight, name):
        return reason
    if not seen.calls.get(name):
        return IDLE
    if has_hooks(module):
        return HOOKED
    packed, floats = packed_bytes(spec, *weight.shape), weight.nbytes
    if packed >= floats:
        return f"it would not get smaller: {packed} bytes in {spec.describe()}, {floats} in float"
    return ""


def packed_bytes(spec: Embeddings, rows: int, cols: int) -> int:
    """Of quantized rows, without books that they share."""
    return rows * sum(row_bytes(cols, spec.bits, spec.row_kind, spec.scale_dtype))
