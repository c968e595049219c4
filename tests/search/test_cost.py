"""Bytes as stored, and bit operations."""

import pytest

import qk
from qk.deploy import file_bytes
from qk.prepare import prepare
from qk.search.bank import Bank
from qk.search.cost import bit_operation_costs, size_costs
from qk.search.items import find_items
from qk.spec import Recipe
from search.small import data, net

HEADER = 200e-6  # MB: what the file's header may be shorter by, as offsets of narrower weights have fewer digits


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("choice", [(0, 0, 0, 0), (5, 3, 1, 2), (4, 4, 4, 4)])
def test_the_size_is_that_of_the_checkpoint(group_size, choice):
    recipe = Recipe(overrides={name: {"group_size": group_size} for name in ("one.*", "two.*")})
    p = prepare(net(), data()[0], recipe)
    bank = Bank(p, find_items(p, (2, 3, 8), (4, 8), False, None), data(1), "minmax")
    costs = size_costs(p, bank.items, data(1)[0])
    bank.put(choice)
    stored = file_bytes(qk.convert(bank.p)) / 1e6
    assert stored <= costs.of(choice) <= stored + HEADER


def test_bit_operations_are_those_of_one_sample():
    p = prepare(net(), data()[0], Recipe(skip=["two.b"]))
    items = find_items(p, (2, 8), (4, 8), False, None)
    costs = bit_operation_costs(p, items)
    pixels, a, skip = 6 * 6, 16 * 16 * 9, 16 * 16  # where the stride is done
    assert costs.items[1] == [pixels * a * bits / 1e9 for bits in (64, 32, 16, 8)]
    assert costs.items[0] == [pixels * (a + skip) * bits / 1e9 for bits in (64, 32, 16, 8)]
    stem, head, in_float = 144 * 16 * 27 * 64, 16 * 6 * 64, pixels * a * 32 * 32
    assert costs.rest == pytest.approx((stem + head + in_float) / 1e9, rel=1e-12)
