"""Which layers are chosen together, from which widths, and which stay as they are."""

import pytest
import torch
from torch import nn

import qk
from qk.prepare import prepare
from qk.search.bank import Bank
from qk.search.items import find_items, plan_of
from qk.spec import QuantSpec, Recipe
from search.small import data, net

WIDTHS = ((2, 4, 8), (4, 8))


def prepared(**fields):
    return prepare(net(), data()[0], Recipe(**fields))


def test_linked_layers_are_one_item_and_the_ends_are_kept():
    items = find_items(prepared(), *WIDTHS, False, None)
    assert [item.layers for item in items] == [("one.a", "one.skip"), ("one.b",), ("two.a", "two.skip"), ("two.b",)]
    assert items[0].options == ((8, 8), (8, 4), (4, 8), (4, 4), (2, 8), (2, 4))
    assert items[0].name == "one.a+one.skip"


def test_tied_widths_come_in_pairs_the_widest_first():
    assert find_items(prepared(), (2, 8), (4, 8), True, None)[0].options == ((8, 8), (2, 4))


def test_patterns_keep_layers_and_what_they_are_linked_to():
    items = find_items(prepared(), *WIDTHS, False, ["two.skip", "stem"])
    assert [item.name for item in items] == ["one.a+one.skip", "one.b", "two.b", "head"]
    assert len(find_items(prepared(), *WIDTHS, False, [])) == 6


def test_float_layers_are_no_items_and_stay_float():
    p = prepared(skip=["one.b"])
    items = find_items(p, *WIDTHS, False, None)
    assert "one.b" not in [item.name for item in items]
    assert plan_of(p, items, [5] * len(items))["one.b"].is_float


def test_a_plan_of_a_choice():
    p = prepared(group_size=None, overrides={"two.b": {"symmetric": True}})
    items = find_items(p, *WIDTHS, False, None)
    plan = plan_of(p, items, (1, 2, 5, 0))
    assert plan["one.a"] == plan["one.skip"] == QuantSpec(8, 4)
    assert plan["two.b"] == QuantSpec(8, 8, symmetric=True)
    assert plan["stem"] == p.plan["stem"]


class Long(nn.Module):
    """K of the second is such that 8-bit weights and activations could leave int32, and narrower ones cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 70_000), nn.Linear(70_000, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_widths_whose_sums_could_overflow_are_no_options():
    p = prepare(Long(), torch.randn(2, 4), Recipe(weights=2, activations=4))
    (item,) = find_items(p, *WIDTHS, False, None)
    assert item.options == ((8, 4), (4, 8), (4, 4), (2, 8), (2, 4))


@pytest.mark.parametrize(
    ("weights", "activations", "tied", "keep", "says"),
    [
        ((), (8,), False, None, "weights must be different widths of 2, 3, 4, 8, got"),
        ((5,), (8,), False, None, "weights must be"),
        ((4, 4), (8,), False, None, "weights must be"),
        ((4,), (9,), False, None, "activations must be"),
        ((2, 4), (8,), True, None, "as many of each"),
        ((4,), (8,), False, ["nowhere"], "patterns that match layers, got 'nowhere'"),
        ((4,), (8,), False, ["*"], "to choose for, got none"),
    ],
)
def test_what_is_refused(weights, activations, tied, keep, says):
    with pytest.raises(qk.QkError, match=says):
        find_items(prepared(), weights, activations, tied, keep)


@pytest.mark.parametrize("fields", [{"symmetric": True, "points": 2}, {"sparq": "5opt"}])
def test_layers_of_several_points_or_windows_are_refused(fields):
    with pytest.raises(qk.QkError, match="a plan of plain codes"):
        find_items(prepared(weights=4, **fields), *WIDTHS, False, None)


@pytest.mark.parametrize("choice", [(0, 0, 0, 0), (5, 1, 2, 3), (4, 4, 0, 5)])
def test_the_bank_gives_what_calibration_gives(choice):
    p, batches = prepared(), data()
    items = find_items(p, *WIDTHS, False, None)
    bank = Bank(p, items, batches)
    bank.put((3, 3, 3, 3))
    bank.put(choice)
    qk.apply_plan(p, plan_of(p, items, choice))
    qk.calibrate(p, batches)
    assert bank.p.plan == p.plan
    for ours, theirs in zip(bank.p.quant_layers().values(), p.quant_layers().values(), strict=True):
        assert ours.spec == theirs.spec
        assert ours.input.bits == theirs.input.bits
        for name in ("codes", "weight_step", "weight_zero"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.input.step, theirs.input.step)
        assert torch.equal(ours.input.zero, theirs.input.zero)
    with bank.p.quantized() as ours, p.quantized() as theirs:
        assert torch.equal(ours(batches[0]), theirs(batches[0]))
    assert torch.equal(qk.convert(bank.p)(batches[0]), qk.convert(p)(batches[0]))


def test_the_bank_refuses_what_depends_on_the_whole_plan():
    p = prepared()
    with pytest.raises(qk.QkError, match="those of each tensor alone, got lapq"):
        Bank(p, find_items(p, *WIDTHS, False, None), data(), "lapq")
