"""How far a model's output is from what it should be: what calibration by the task's loss and reconstruction share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qk.calibrate.batches import unpadded
from qk.errors import fail


def first_tensor(output: Any, stage: str = "qk.reconstruct") -> Tensor:
    """What is matched of a unit's output, and compared of a model's: `logits`, or the first floating tensor."""
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise fail(stage, "a unit's or the model's output", "or hold a floating tensor", type(output).__name__)


def are_logits(output: Tensor) -> bool:
    """[batch, classes]: what softmax makes of it is a distribution for each sample."""
    return output.dim() == 2 and output.shape[1] > 1


def task_loss(found: Tensor, expected: Tensor, batch: Any = None) -> Tensor:
    """How far the model's output is from the float model's, summed over samples.

    [batch, classes] are logits: KL(softmax(expected) || softmax(found)). Anything else has no classes that could be
    told from its shape: half the squared error. batch: that gave both; of such an output its padding does not count
    (qk.calibrate.batches). Raises QkError for shapes that differ, as of boxes that were found.
    """
    if found.shape != expected.shape:
        got = f"{list(found.shape)} in place of {list(expected.shape)}"
        advice = "An output that is no fixed tensor needs loss='mse', and ranges other than lapq."
        raise fail("the task's loss", "the model's output", "of the shape that it has in float", got, advice)
    if are_logits(found):
        return F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True)
    return 0.5 * unpadded(batch, (found - expected).square()).sum()


def label_loss(found: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed over samples. found: [batch, classes, ...]; labels: [batch, ...], classes."""
    return F.cross_entropy(found, labels, reduction="sum")
