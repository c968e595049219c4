"""The order of extra rows, and which of a channel's points is its last."""

import pytest
import torch

from qk.errors import QkError
from qk.prepare.points import add_to_owners, check_owners, last_of, parts_of, with_last

OWNERS = torch.tensor([1, 3, 4, 3])  # channel 3 has three points


def test_parts_rise():
    assert parts_of(OWNERS) == [slice(0, 3), slice(3, 4)]
    assert parts_of(OWNERS[:3]) == [slice(0, 3)]
    assert parts_of(torch.tensor([0, 0])) == [slice(0, 1), slice(1, 2)]


def test_rows_are_added_in_order():
    first = torch.tensor([[0.0], [1.0], [2.0], [2.0**24], [4.0], [5.0]])
    rows = torch.tensor([[10.0], [1.0], [30.0], [1.0]])
    # 2^24 + 1 rounds to 2^24 in float32, twice; 2^24 + (1 + 1) would not.
    expected = [[0.0], [11.0], [2.0], [2.0**24], [34.0], [5.0]]
    assert add_to_owners(first, rows, OWNERS).tolist() == expected


def test_the_last_point_is_found_and_replaced():
    first, rows = torch.arange(6), torch.tensor([10, 30, 40, 300])
    assert last_of(first, rows, OWNERS).tolist() == [0, 10, 2, 300, 40, 5]
    new = torch.arange(-6, 0)
    changed = with_last(first, rows, OWNERS, new)
    assert [t.tolist() for t in changed] == [[-6, 1, -4, 3, 4, -1], [-5, 30, -2, -3]]
    assert torch.equal(last_of(*changed, OWNERS), new)
    assert rows.tolist() == [10, 30, 40, 300]


@pytest.mark.parametrize(
    ("owners", "words"),
    [
        ([0, 6], "channels, from 0 to 5, got 0 to 6"),
        ([-1, 2], "channels, from 0 to 5, got -1 to 2"),
        ([1, 1, 1], "rising for the second points, then rising for the third ones, got 3 rising parts"),
        ([1, 2, 0], "third points of channels that have a second, got channel 0, which has none"),
    ],
)
def test_owners_out_of_order_are_refused(owners, words):
    with pytest.raises(QkError, match=f"stage: owners must be {words}"):
        check_owners("stage", "owners", torch.tensor(owners), 6)
    check_owners("stage", "owners", OWNERS, 6)
