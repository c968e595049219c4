"""ALPS without training: the loss of the whole network with one item narrowed."""

from __future__ import annotations

import numpy as np
import torch

from qk.calibrate.objective import first_tensor, task_loss
from qk.calibrate.prefix import PrefixCache
from qk.inputs import evaluating
from qk.methods.cache import Room
from qk.methods.engine import outputs_of
from qk.search.bank import Bank
from qk.search.items import STAGE
from qk.search.parts import Parts
from qk.search.sensitivity import Sensitivity


@torch.no_grad()
def alps(bank: Bank, batches: list, memory_mb: float = 1024, parts: Parts | None = None) -> Sensitivity:
    """How much further from the float model's output the network is with one item at an option, than with all at their
    widest; in nats for logits (qk.calibrate.objective.task_loss), 0 where it comes nearer.

    The paper trains an epoch for each item and takes the loss of that; here weights are rounded to nearest. Outputs
    before the item are kept in memory_mb and do not run again. Source: Bablani et al., Efficient and Effective Methods
    for Mixed Precision Neural Network Quantization (2023), ALPS.
    """
    p, widest = bank.p, [0] * len(bank.items)
    room = Room(memory_mb)
    with evaluating(p.model):
        expected = outputs_of(p, batches, room)
    samples = sum(len(output) for output in expected)
    uses = {p.quant_layers()[name]: (i,) for i, item in enumerate(bank.items) for name in item.layers}

    with evaluating(p.model), p.quantized(), PrefixCache(p, uses, room.left / 2**20, STAGE) as cache:

        def loss(*narrowed: tuple[int, int]) -> float:
            """With these items at these options."""
            choice = list(widest)
            for item, option in narrowed:
                choice[item] = option
            bank.put(choice)
            cache.move(np.array(choice, dtype=np.float64))
            total = 0.0
            for i, batch in enumerate(batches):
                found = first_tensor(cache.run(i, batch), STAGE)
                total += float(task_loss(found, expected[i].to(found.device), batch))
            return total / samples

        def of_item(number: int) -> list[float]:
            """Of the first: all at their widest. Then the last item first: what comes before it stays as it is."""
            if number == 0:
                return [loss()]
            item = len(widest) - number
            return [loss((item, option)) for option in range(1, len(bank.items[item].options))]

        (untouched,), *found = (parts or Parts()).all(1 + len(widest), of_item)
    bank.put(widest)
    losses = [[0.0, *(max(0.0, narrowed - untouched) for narrowed in own)] for own in reversed(found)]
    return Sensitivity("alps", losses, unit="nats")
