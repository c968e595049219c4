"""ALPS: the loss of the whole network with one item narrowed, as it is then, or after it has learned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qk.calibrate.batches import call
from qk.calibrate.objective import first_tensor, task_loss
from qk.calibrate.prefix import PrefixCache
from qk.errors import fail
from qk.inputs import evaluating
from qk.methods.brecq import learn_unit
from qk.methods.cache import Room
from qk.methods.engine import outputs_of
from qk.methods.tune import tune
from qk.search.bank import Bank
from qk.search.items import STAGE
from qk.search.parts import Parts
from qk.search.sensitivity import Sensitivity
from qk.spec import Recipe

LEARNED = Recipe(iterations=200, batch_size=32)  # of rounding, for each layer
TRAINED = Recipe(method="lsq")
SMALL = 1e-3  # rate of an epoch from a network that is trained


@torch.no_grad()
def alps(bank: Bank, batches: list, memory_mb: float = 1024, parts: Parts | None = None) -> Sensitivity:
    """How much further from the float model's output the network is with one item at an option, than with all at their
    widest; in nats for logits (qk.calibrate.objective.task_loss), 0 where it comes nearer.

    The paper trains an epoch for each item and takes the loss of that (alps_trained); here weights are rounded to
    nearest. Outputs before the item are kept in memory_mb and do not run again. Source: Bablani et al., Efficient and
    Effective Methods for Mixed Precision Neural Network Quantization (2023), ALPS.
    """
    p, room = bank.p, Room(memory_mb)
    layers = p.quant_layers()
    uses = {layers[name]: (i,) for i, item in enumerate(bank.items) for name in item.layers}
    with evaluating(p.model), p.quantized():
        expected = outputs_of(p, batches, room)
        with PrefixCache(p, uses, room.left / 2**20, STAGE) as cache:

            def loss(choice: list[int], item: int | None) -> float:
                bank.put(choice)
                cache.move(np.array(choice, dtype=np.float64))
                return _divergence(cache.run, batches, expected)

            return _estimate("alps", bank, parts, loss)


def alps_learned(
    bank: Bank,
    batches: list,
    memory_mb: int = 1024,
    parts: Parts | None = None,
    seed: int = 0,
    recipe: Recipe = LEARNED,
) -> Sensitivity:
    """As alps, but by then the layers of the narrowed item have learned their rounding and steps (recipe: as for
    reconstruct), each by its own output. They learn from the batches of even number and are judged on the others, where
    there are any, as what was learned fits its own data."""
    p, recipe = bank.p, replace(recipe, seed=seed, memory_mb=memory_mb)
    learn_from, judge_on = (batches[::2], batches[1::2]) if len(batches) > 1 else (batches, batches)
    with evaluating(p.model):
        expected = outputs_of(p, judge_on, Room(memory_mb))

        def loss(choice: list[int], item: int | None) -> float:
            bank.put(choice)
            layers, learned = p.quant_layers(), set()
            try:
                for name in () if item is None else bank.items[item].layers:
                    prefix = {*layers, *p.tables} - {name}
                    learn_unit(p, p.alone[name], prefix, learn_from, recipe, learned)
                    learned.add(layers[name].input)  # linked layers share it: the first one's step stays
                with torch.no_grad(), p.quantized():
                    return _divergence(lambda i, batch: call(p, batch, i, STAGE), judge_on, expected)
            finally:
                bank.forget()  # the codes and steps that were learned

        return _estimate("alps_learned", bank, parts, loss)


def check_train(train: Iterable | None) -> None:
    """Raises QkError where there is nothing to train on."""
    if train is None:
        raise fail(STAGE, "train", "labelled data to train on with alps_trained", "none", "alps needs none.")


def alps_trained(
    bank: Bank, train: Iterable | None, parts: Parts | None = None, seed: int = 0, recipe: Recipe = TRAINED
) -> Sensitivity:
    """The paper's: the mean loss of an epoch of training (qk.tune) that begins with one item at an option and the rest
    at their widest, less that of an epoch with all at their widest; 0 where it is less.

    train: as for qk.tune; in a folder it is taken to be what it was. recipe: its tuning; one epoch, at a rate
    of 1e-3 where it names none.
    """
    check_train(train)
    tuning = replace(recipe.tuning, epochs=1, lr=recipe.tuning.lr or SMALL)
    recipe = replace(recipe, tuning=tuning, seed=seed)

    def loss(choice: list[int], item: int | None) -> float:
        bank.put(choice)
        p = copy.deepcopy(bank.p)
        tune(p, train, recipe, progress="off")
        return p.history[""][-1]["loss"]

    return _estimate("alps_trained", bank, parts, loss)


def _divergence(run: Callable[[int, Any], Any], batches: list, expected: list[Tensor]) -> float:
    """Of what run gives for each batch from the output that is expected, for a sample."""
    total = 0.0
    for i, batch in enumerate(batches):
        found = first_tensor(run(i, batch), STAGE)
        total += float(task_loss(found, expected[i].to(found.device), batch))
    return total / sum(map(len, expected))


def _estimate(
    kind: str, bank: Bank, parts: Parts | None, loss: Callable[[list[int], int | None], float]
) -> Sensitivity:
    """loss: of a choice in which one item may be narrowed, that of this number."""
    widest = [0] * len(bank.items)

    def of_item(number: int) -> list[float]:
        """Of the first: all at their widest. Then the last item first: what comes before it stays as it is."""
        if number == 0:
            return [loss(widest, None)]
        item = len(widest) - number
        narrowed = range(1, len(bank.items[item].options))
        return [loss([*widest[:item], option, *widest[item + 1 :]], item) for option in narrowed]

    (untouched,), *found = (parts or Parts()).all(1 + len(widest), of_item)
    bank.put(widest)
    losses = [[0.0, *(max(0.0, narrowed - untouched) for narrowed in own)] for own in reversed(found)]
    return Sensitivity(kind, losses, unit="nats")
