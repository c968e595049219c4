"""ALPS without training: the loss of the whole network with one item narrowed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qk.calibrate.batches import call, counting
from qk.calibrate.objective import first_tensor, task_loss
from qk.calibrate.prefix import PrefixCache
from qk.inputs import evaluating
from qk.search.bank import Bank
from qk.search.items import STAGE
from qk.search.sensitivity import Sensitivity


@torch.no_grad()
def alps(bank: Bank, batches: list, memory_mb: float = 1024) -> Sensitivity:
    """How much further from the float model's output the network is with one item at an option, than with all at their
    widest; in nats for logits (qk.calibrate.objective.task_loss), 0 where it comes nearer.

    The paper trains an epoch for each item and takes the loss of that; here weights are rounded to nearest. Outputs
    before the item are kept in memory_mb and do not run again. Source: Bablani et al., Efficient and Effective Methods
    for Mixed Precision Neural Network Quantization (2023), ALPS.
    """
    p, widest = bank.p, [0] * len(bank.items)
    with evaluating(p.model), p.quantized(set()):
        expected = [first_tensor(call(p, batch, i, STAGE), STAGE).clone() for i, batch in enumerate(batches)]
    samples = sum(len(output) for output in expected)
    room = memory_mb - sum(output.nbytes for output in expected) / 2**20
    uses = {p.quant_layers()[name]: (i,) for i, item in enumerate(bank.items) for name in item.layers}

    with evaluating(p.model), p.quantized(), PrefixCache(p, uses, max(0.0, room), STAGE) as cache:

        def loss(choice: list[int]) -> float:
            bank.put(choice)
            cache.move(np.array(choice, dtype=np.float64))
            return sum(_loss(cache.run(i, batch), expected[i], batch) for i, batch in enumerate(batches)) / samples

        untouched, losses = loss(widest), []
        for i in reversed(range(len(widest))):  # the last first: what comes before stays as it is
            narrowed = range(1, len(bank.items[i].options))
            own = [loss([*widest[:i], option, *widest[i + 1 :]]) - untouched for option in narrowed]
            losses.append([0.0, *(max(0.0, change) for change in own)])
    bank.put(widest)
    return Sensitivity("alps", losses[::-1], unit="nats")


def _loss(output: object, expected: Tensor, batch: object) -> float:
    found = first_tensor(output, STAGE)
    return float(task_loss(found, expected, counting(batch, found)))
