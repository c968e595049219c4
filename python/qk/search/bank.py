"""A model that can take any of the widths in question at once, so that thousands of plans can be tried."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qk.calibrate import calibrate
from qk.errors import fail
from qk.ops import dequantize
from qk.prepare.apply import apply_plan
from qk.prepare.prepared import Prepared, check_prepared
from qk.search.items import STAGE, Item, plan_of, with_widths
from qk.spec import Plan, Ranges


@dataclass(frozen=True)
class Weight:
    """Of one layer at one width, as QuantLayer has them."""

    codes: Tensor
    step: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Input:
    """Of one layer's input at one width."""

    step: Tensor
    zero: Tensor


def check_ranges(p: Prepared, ranges: Ranges) -> None:
    """Raises QkError for what is no p, for one with smoothed inputs, and for ranges that depend on the whole plan."""
    check_prepared(p, STAGE)
    if ranges == "lapq":
        raise fail(STAGE, "ranges", "those of each tensor alone", "lapq, which depends on the whole plan")
    scaled = [name for name, layer in p.quant_layers().items() if layer.input_scale is not None]
    if scaled:
        got = f"smoothed inputs of {', '.join(scaled[:5])}"
        raise fail(STAGE, "p", "as prepared", got, "Search first, then apply the plan, smooth and calibrate.")


class Bank:
    """A copy of p, calibrated for every option of every item: `put` gives it the codes and steps of any choice.

    They are those that qk.calibrate gives after qk.apply_plan with that choice's plan, as ranges of a layer depend on
    no other layer's width; ranges "lapq", which searches for all steps together, is refused. p stays as it is.
    """

    def __init__(self, p: Prepared, items: list[Item], batches: list, ranges: Ranges = "mse") -> None:
        check_ranges(p, ranges)
        self.p, self.items = copy.deepcopy(p), items
        self._weights: dict[tuple[str, int], Weight] = {}
        self._inputs: dict[tuple[str, int], Input] = {}
        while any(self._missing(item) for item in items):  # one option of every item in each round
            self.choice = tuple(self._newest(item) for item in items)
            apply_plan(self.p, plan_of(p, items, self.choice))
            calibrate(self.p, batches, ranges)
            self._record()

    def put(self, choice: Sequence[int]) -> None:
        """choice: number of the option of each item."""
        layers, specs = self.p.quant_layers(), {}
        for item, before, number in zip(self.items, self.choice, choice, strict=True):
            if before == number:
                continue
            weights, activations = item.options[number]
            for name in item.layers:
                layer, weight = layers[name], self._weights[name, weights]
                layer.spec = specs[name] = with_widths(layer.spec, (weights, activations))
                layer.codes, layer.weight_step, layer.weight_zero = weight.codes, weight.step, weight.zero
                if layer.spec.dynamic:
                    layer.input.bits = activations
                    continue
                quantizer, found = layer.input, self._inputs[name, activations]
                quantizer.bits = activations
                quantizer.set_range(found.step, found.zero)
        self.choice = tuple(choice)
        self.p.plan = Plan(self.p.plan.layers | specs)

    def forget(self) -> None:
        """Codes and steps that were learned in place: the next `put` writes all of them anew."""
        self.choice = (-1,) * len(self.items)

    def codes(self, name: str, weights: int) -> Tensor:
        """uint8 codes of a layer's weight at that width, in kernel order."""
        return self._weights[name, weights].codes

    def values(self, name: str, weights: int) -> Tensor:
        """What these codes stand for, float32 in kernel order."""
        found = self._weights[name, weights]
        return dequantize(found.codes, found.step, found.zero)

    def _missing(self, item: Item) -> list[int]:
        """Numbers of the options of which something is not known."""
        return [option for option in range(len(item.options)) if self._unknown(item, option)]

    def _newest(self, item: Item) -> int:
        """The missing option of which most is unknown; the first of all if none is missing."""
        return max(self._missing(item), key=lambda option: self._unknown(item, option), default=0)

    def _unknown(self, item: Item, option: int) -> int:
        """How many of the two widths of an option have no state yet."""
        (weights, activations), name = item.options[option], item.layers[0]
        return ((name, weights) not in self._weights) + ((name, activations) not in self._inputs)

    def _record(self) -> None:
        """The states of now."""
        layers = self.p.quant_layers()
        for item, number in zip(self.items, self.choice, strict=True):
            weights, activations = item.options[number]
            for name in item.layers:
                layer = layers[name]
                self._weights[name, weights] = Weight(layer.codes, layer.weight_step, layer.weight_zero)
                found = (torch.ones(1), torch.zeros(1, dtype=torch.int32))  # a dynamic layer has none
                if not layer.spec.dynamic:
                    found = (layer.input.step.detach().clone(), layer.input.zero.clone())
                self._inputs[name, activations] = Input(*found)
