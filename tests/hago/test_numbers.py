"""Integer arithmetic of devices, steps of tensors, and the tuners on losses that are known."""

from fractions import Fraction
from itertools import product
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hago.nets import build
from qk.hago import hago, integers
from qk.hago.topology import Dimension
from qk.hago.tuners import TUNERS, Trials

LARGE = st.integers(-(2**31), 2**31 - 1)


@given(x=st.integers(-(2**40), 2**40), bits=st.integers(8, 32))
def test_wrap_is_modulo(x, bits):
    found = int(integers.wrap(torch.tensor(x), bits))
    assert -(2 ** (bits - 1)) <= found < 2 ** (bits - 1)
    assert (found - x) % 2**bits == 0


ROUND = {
    "floor": floor,
    "half_up": lambda v: floor(v + Fraction(1, 2)),
    "half_away": lambda v: (1 if v > 0 else -1) * floor(abs(v) + Fraction(1, 2)),
    "nearest_even": round,
}


@given(x=LARGE, multiplier=st.integers(2**30, 2**31), shift=st.integers(0, 62), how=st.sampled_from(sorted(ROUND)))
def test_requantize_rounds_as_it_says(x, multiplier, shift, how):
    found = integers.rounded(torch.tensor(x) * multiplier, torch.tensor([shift]), how)
    assert int(found) == ROUND[how](Fraction(x * multiplier, 2**shift))


@given(ratio=st.floats(2.0**-30, 2.0**30))
def test_multipliers_are_within_half_a_unit(ratio):
    multiplier, shift = integers.fixed_point(torch.tensor([ratio], dtype=torch.float64))
    # a mantissa of 31 bits, of which the first is 1
    assert abs(Fraction(int(multiplier), 2 ** int(shift)) / Fraction(ratio) - 1) <= Fraction(1, 2**31)


def test_multipliers_have_31_bits():
    multiplier, shift = integers.fixed_point(torch.tensor([1 - 2.0**-40], dtype=torch.float64))
    assert (int(multiplier), int(shift)) == (2**30, 30)


def test_wide_limits_hold_though_float32_rounds_them_up():
    found = integers.quantize(torch.tensor([3e9, -3e9]), torch.ones(1), 2**30 - 1)
    assert found.tolist() == [2**30 - 1, 1 - 2**30]


def test_powers_of_two_are_shifts():
    for exponent in range(-20, 20):
        multiplier, shift = integers.fixed_point(torch.tensor([2.0**exponent], dtype=torch.float64))
        assert Fraction(int(multiplier), 2 ** int(shift)) == Fraction(2) ** exponent
    steps = integers.power_of_two(torch.tensor([0.3, 0.25, 0.2501]))
    assert steps.tolist() == [0.5, 0.25, 0.5]


class Sum(nn.Module):
    """A sum of `length` channels, all with the weight 1, after a layer that makes it a network."""

    def __init__(self, length):
        super().__init__()
        self.first, self.sum = nn.Conv2d(1, length, 1, bias=False), nn.Conv2d(length, 1, 1, bias=False)
        nn.init.ones_(self.sum.weight)

    def forward(self, x):
        return self.sum(self.first(x))


@pytest.mark.parametrize(("bits", "step", "limit"), [(8, 0.01953125, 127), (4, 0.3125, 7)])
def test_steps_of_the_sheet(bits, step, limit):
    net, batches = build("flat")
    batches = [b.clamp(-2.5, 2.5) for b in batches]
    batches[0][0, 0, 0, 0] = 2.5
    found = hago(net, batches, "arm_neon_dotprod", tuner="default", ranges="minmax")
    first = found.topology.dimensions[0]
    grid = found.grids.of(first, {d.name: bits for d in found.topology.dimensions})
    assert (float(grid.step), int(grid.zero), grid.limit) == (step, 0, limit)  # 2.5 / 2^(bits - 1)


def test_ranges_can_be_means_of_those_of_batches():
    net, batches = build("flat")
    batches = [batches[0].clamp(-2.5, 1), batches[1].clamp(-1.5, 3)]
    for batch, low, high in zip(batches, (-2.5, -1.5), (1, 3), strict=True):
        batch.view(-1)[:2] = torch.tensor([low, high])
    found = hago(net, batches, "arm_neon_dotprod", tuner="default", ranges="average")
    first = found.topology.dimensions[0]
    assert found.strategy.steps[first.name] == (0.015625, 0)  # -2 to 2: 2 / 2^7


@pytest.mark.parametrize(
    ("bits", "accumulator", "longest"),
    [(8, "int16", 2), (4, "int16", 668), (8, "int32", 133144)],
)
def test_lengths_of_sums_of_the_sheet(bits, accumulator, longest):
    for length, wraps in ((longest, False), (longest + 1, True)):
        device = "int16_accumulator" if accumulator == "int16" else "arm_neon_dotprod"
        found = hago(Sum(length).eval(), [torch.ones(1, 1, 1, 1)], device, tuner="default", ranges="minmax")
        *_, node = found.topology.integer
        assert found.grids.may_wrap(node, {d.name: bits for d in found.topology.dimensions}) == wraps


def trials(limit):
    """Losses and costs that add up: of three tensors, the second matters most."""
    weights = {"a": 1.0, "b": 30.0, "c": 3.0}
    dimensions = [Dimension(name, name, (), (8, 6, 4, 2)) for name in weights]
    return Trials(
        [(d,) for d in dimensions],
        lambda bits: sum(w * 4.0 ** -bits[name] for name, w in weights.items()),
        lambda bits: float(sum(bits.values())),
        limit,
    )


@pytest.mark.parametrize("limit", [24, 20, 16, 12, 8, 6])
def test_exact_is_brute_force(limit):
    search = trials(limit)
    found = TUNERS["exact"](search)
    every = ({"a": a, "b": b, "c": c} for a, b, c in product((8, 6, 4, 2), repeat=3))
    best = min(search.loss(bits) for bits in every if search.fits(bits))
    assert search.fits(found)
    assert search.loss(found) == best


def test_greedy_ends_where_narrow_is_not_cheap():
    dimensions = [Dimension(name, name, (), (8, 4, 2)) for name in "ab"]
    price = {8: 10.0, 4: 5.0, 2: 7.0}
    search = Trials([(d,) for d in dimensions], lambda bits: 0.0, lambda bits: sum(price[b] for b in bits.values()), 10)
    assert search.cost(TUNERS["greedy"](search)) == 10


def test_a_loss_that_is_no_number_is_the_worst():
    search = trials(24)
    search.measure = lambda bits: float("nan") if bits["a"] < 8 else 1.0
    assert TUNERS["greedy"](search)["a"] == 8


@pytest.mark.parametrize("tuner", ["greedy", "random", "annealing"])
def test_the_others_keep_the_limit_and_come_near(tuner):
    search = trials(14)
    found = TUNERS[tuner](search, count=60, seed=0)
    assert search.fits(found)
    assert found["b"] >= found["a"]
    assert search.loss(found) <= 20 * search.loss(TUNERS["exact"](search))
