"""Sensitivities by Fisher information: what the errors of a block's output do to the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qk.calibrate.batches import call, unpadded
from qk.calibrate.objective import are_logits, first_tensor
from qk.inputs import part_generator
from qk.methods.cache import Call
from qk.methods.engine import frozen, replaced
from qk.prepare.prepared import Unit
from qk.search.bank import Bank
from qk.search.items import STAGE
from qk.search.parts import Parts
from qk.search.sensitivity import Pairs, Sensitivity

DRAWS = 4  # of labels for each sample


def fisher(
    bank: Bank, batches: list, draws: int = DRAWS, full: bool = True, seed: int = 0, parts: Parts | None = None
) -> Sensitivity:
    """BRECQ's: half the expected squared change of log p(y), for labels y drawn from the model's own output.

    That is the divergence from the float model's output in second order (in nats), for the errors dz of a block's
    output: 1/2 E[(g dz)^2] with g the gradient of log p(y). full: so; else 1/2 E[sum g^2 dz^2], which takes errors of
    different values for independent. An item's loss has it alone quantized; pairs of one block have what both at once
    add, since a block's errors meet inside it. Of an output that is no [batch, classes] it is half the squared error.
    Source: Li et al., BRECQ (2021), on mixed precision; docs/decisions/0007-search.md on the whole form.
    """

    def of_batch(index: int) -> list[float]:
        sums = _Sums(bank)
        generator = part_generator(seed, index)  # batches come in any order
        with frozen(bank.p.model), bank.p.quantized(set()):
            samples = sums.add(batches[index], index, draws, full, generator)
        return [samples, *sums.values()]

    found = map(sum, zip(*(parts or Parts()).all(len(batches), of_batch), strict=True))
    samples, sums = next(found), _Sums(bank)
    losses = [[next(found) / samples for _ in row] for row in sums.alone]
    both = {inside: [[next(found) for _ in row] for row in table] for inside, table in sums.both.items()}
    pairs: Pairs = {}
    for (i, j), table in both.items():
        alone = [[one + other for other in losses[j]] for one in losses[i]]
        pairs[i, j] = [[x / samples - y for x, y in zip(*rows, strict=True)] for rows in zip(table, alone, strict=True)]
    return Sensitivity("fisher", losses, pairs, "nats")


class _Sums:
    """Sums over samples: of each item at each option alone, and of two items in one block."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        place = {name: i for i, item in enumerate(bank.items) for name in item.layers}
        self.units = {unit: sorted({place[n] for n in unit.layers if n in place}) for unit in bank.p.units}
        self.alone = [[0.0] * len(item.options) for item in bank.items]
        self.both: dict[tuple[int, int], list[list[float]]] = {}
        for inside in self.units.values():
            for i, j in combinations(inside, 2):
                self.both[i, j] = [[0.0] * len(bank.items[j].options) for _ in bank.items[i].options]

    def values(self) -> Iterator[float]:
        """All of them in a row."""
        for table in (self.alone, *self.both.values()):
            for row in table:
                yield from row

    def add(self, batch: Any, index: int, draws: int, full: bool, generator: torch.Generator) -> int:
        """Takes a batch in; returns how many samples it has."""
        units = [unit for unit, inside in self.units.items() if inside]
        with _watched(self.bank, units) as (calls, outputs), torch.enable_grad():
            output = first_tensor(call(self.bank.p, batch, index, STAGE), STAGE)
            slopes: list[list[Tensor]] = [[] for _ in outputs]
            for loss in _drawn(output, batch, draws, generator):
                found = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True)
                for kept, slope, like in zip(slopes, found, outputs.values(), strict=True):
                    kept.append(torch.zeros_like(like) if slope is None else slope)
        with torch.no_grad():
            for (unit, of_unit), slope in zip(outputs.items(), slopes, strict=True):
                self._unit(unit, calls[unit], of_unit, torch.stack(slope), full)
        return len(output)

    def _unit(self, unit: Unit, taken: Call, output: Tensor, slopes: Tensor, full: bool) -> None:
        """taken, output: of the float model. slopes: [draws, *output]."""
        bank, inside = self.bank, self.units[unit]
        module, before = unit.module(bank.p.model), output.detach()
        if not full:
            slopes = slopes.square().mean(0, keepdim=True)

        def loss(chosen: dict[int, int]) -> float:
            """With these options of these items, and all else in float."""
            bank.put([chosen.get(i, 0) for i in range(len(bank.items))])
            with bank.p.quantized({name for i in chosen for name in bank.items[i].layers}):
                args, kwargs = taken.again(before.device)
                change = first_tensor(module(*args, **kwargs), STAGE) - before
            if full:
                return 0.5 * float((slopes * change).flatten(2).sum(2).double().square().mean(0).sum())
            return 0.5 * float((slopes * change.square()).double().sum())

        for i in inside:
            for a in range(len(bank.items[i].options)):
                self.alone[i][a] += loss({i: a})
        for i, j in combinations(inside, 2):
            for a in range(len(bank.items[i].options)):
                for b in range(len(bank.items[j].options)):
                    self.both[i, j][a][b] += loss({i: a, j: b})


@contextmanager
def _watched(bank: Bank, units: list[Unit]) -> Iterator[tuple[dict[Unit, Call], dict[Unit, Tensor]]]:
    """Filled with what each unit takes and gives when it is first called, while the model runs; what it gives gets a
    gradient."""
    calls: dict[Unit, Call] = {}
    outputs: dict[Unit, Tensor] = {}

    def before(unit: Unit) -> Callable:
        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if unit not in calls:
                calls[unit] = Call.of(args, kwargs)

        return see

    def after(unit: Unit) -> Callable:
        def see(_: nn.Module, args: tuple, output: Any) -> Any:
            if unit in outputs:  # a later call of the same module is part of what follows
                return output
            found = first_tensor(output, STAGE)
            outputs[unit] = found if found.requires_grad else found.detach().requires_grad_()
            return replaced(output, outputs[unit].clone())  # a copy: what follows may work in place

        return see

    with ExitStack() as stack:
        for unit in units:
            modules = unit.modules(bank.p.model)
            stack.callback(modules[0].register_forward_pre_hook(before(unit), with_kwargs=True).remove)
            stack.callback(modules[-1].register_forward_hook(after(unit)).remove)
        yield calls, outputs


def _drawn(output: Tensor, batch: Any, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """-log p(y) summed over samples for labels y drawn from p, or, where the output is no [batch, classes], its product
    with noise of unit variance, whose squared gradient is on average that of half the squared error."""
    if are_logits(output):
        share = output.detach().softmax(1).cpu()
        for _ in range(draws):
            labels = torch.multinomial(share, 1, generator=generator)[:, 0].to(output.device)
            yield F.cross_entropy(output, labels, reduction="sum")
        return
    for _ in range(draws):
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        yield unpadded(batch, output * noise).sum()
