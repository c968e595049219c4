"""What each width of each item costs in accuracy, as estimated in one of several ways: losses, lower is better.

Only differences between the options of an item matter to a solver; the first option, the widest, has 0 wherever that
makes sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qk.errors import fail
from qk.search.bank import Bank
from qk.search.items import STAGE, Item

Pairs = dict[tuple[int, int], list[list[float]]]


@dataclass(frozen=True)
class Sensitivity:
    """losses: of each item at each option. pairs: what two items of one block lose together beyond the sum, by the
    options of the first and the second. unit: of the numbers."""

    kind: str
    losses: list[list[float]]
    pairs: Pairs = field(default_factory=dict)
    unit: str = ""

    def of(self, choice: Sequence[int]) -> float:
        """The loss that is expected of a choice."""
        alone = sum(row[number] for row, number in zip(self.losses, choice, strict=True))
        return alone + sum(table[choice[i]][choice[j]] for (i, j), table in self.pairs.items())


def entropy(codes: torch.Tensor) -> float:
    """-sum p log2 p over the codes that occur, in bits."""
    share = torch.bincount(codes.reshape(-1).int()).double() / max(1, codes.numel())
    share = share[share > 0]
    return float(-(share * share.log2()).sum()) + 0.0  # -0.0 where there is one code


def eagl(bank: Bank) -> Sensitivity:
    """EAGL: what a layer's wider codes are worth is their entropy, as codes that fit into fewer bits lose little there.

    A loss is minus the entropy of the codes at that width, summed over the layers of an item; 0 at the narrowest, as
    the paper's gain is that of the wider option over the narrowest. Codes of all channels, each with a step of its own,
    are counted together. Source: Bablani et al., Efficient and Effective Methods for Mixed Precision Neural Network
    Quantization (2023); for two widths it is theirs, from codes of calibration instead of training.
    Raises QkError where one width of weights comes with several of activations, which have no codes to look at.
    """
    check_weights_alone(bank.items, "eagl")

    def gain(item: Item, weights: int) -> float:
        return sum(entropy(bank.codes(name, weights)) for name in item.layers)

    losses = []
    for item in bank.items:
        narrowest = len(item.options) - 1
        losses.append([-gain(item, w) if o < narrowest else 0.0 for o, (w, _) in enumerate(item.options)])
    return Sensitivity("eagl", losses, unit="bits")


def cost_only(items: Sequence[Item]) -> Sensitivity:
    """A control: every item gains as much from a bit as any other, so that those stay wide that are cheap."""
    losses = [[-float(w + a) for w, a in item.options] for item in items]
    return Sensitivity("cost_only", losses, unit="bits")


def chance(items: Sequence[Item], seed: int = 0) -> Sensitivity:
    """A control: what an item gains from a bit is drawn between 0 and 1."""
    worth = np.random.default_rng(seed).random(len(items))
    losses = [[-float(v) * (w + a) for w, a in item.options] for item, v in zip(items, worth, strict=True)]
    return Sensitivity("random", losses)


def check_weights_alone(items: Sequence[Item], kind: str) -> None:
    """Raises QkError where one width of weights comes with several of activations."""
    mixed = [item.name for item in items if len({w for w, _ in item.options}) < len(item.options)]
    if mixed:
        got = f"several with one width of weights, for {mixed[0]}"
        advice = "It looks at weights alone: tie the widths, give one of activations, or take fisher or alps."
        raise fail(STAGE, f"activations with {kind}", "one for each width of weights", got, advice)
