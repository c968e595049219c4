"""Runs a graph of fuse on a batch, to see what its nodes make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._pytree import tree_flatten_spec

from qk.deploy.fusing.graph import AS_IT_IS, Constants
from qk.errors import fail

STAGE = "qk.fuse"


def note_shapes(constants: Constants, example: Any) -> None:
    """Gives every node that makes a tensor its shape and dtype on the example."""

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype

    try:
        run(constants, example, note)
    except RuntimeError as error:
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        advice = (
            "Where it takes the number of rows for a constant, with len(x) for example, x.shape[0] leaves it free. "
        )
        raise fail(STAGE, "model", "one whose graph runs on the example", got, advice + AS_IT_IS) from error


def run(constants: Constants, batch: Any, watch: Callable[[fx.Node, Any], None]) -> None:
    """The graph on a batch; watch is shown what every node makes."""

    class Run(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            watch(node, value)
            return value

    with torch.no_grad():
        Run(constants.root, graph=constants.graph).run(*flat_inputs(constants, batch), enable_io_processing=False)


def flat_inputs(constants: Constants, batch: Any) -> list[Any]:
    """A batch as the placeholders of the graph take it."""
    spec = constants.graph._codegen.pytree_info.in_spec
    keywords = dict(batch) if isinstance(batch, Mapping) else {}
    args = (batch,) if isinstance(batch, Tensor) else () if keywords else tuple(batch)
    order = spec.child(1).context or []
    return tree_flatten_spec((args, {name: keywords[name] for name in order}), spec)
