"""Calibration and reconstruction stay in the memory that they were given, with ten times as much to cache."""

import json
from pathlib import Path

import pytest

from resident import measured, needs_proc

SCRIPT = Path(__file__).with_name("memory.py")
BUDGET = 32
# Activations of one batch that are there at once, beside the cache, while a convolution and a ReLU are learned:
# its input from either prefix, the mask that mixes them, the mixture, its quantized values and what is clipped of them;
# what the convolution and the ReLU give; the target, the errors and their weights; the slope and two gradients. Two
# more are for what the allocator has between them.
PASSING = 16

pytestmark = needs_proc


def taken(budget, rows, **fields):
    return measured(SCRIPT, budget, rows, *(f"{name}={json.dumps(value)}" for name, value in fields.items()))


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        # With Fisher weights in the fast suite: what it caches takes in all that the others do.
        pytest.param(272, {"loss": "fisher"}, id="fisher"),
        pytest.param(432, {}, id="mse", marks=pytest.mark.slow),
        pytest.param(272, {"loss": "fisher_full", "order": "weights_first"}, id="order", marks=pytest.mark.slow),
    ],
)
def test_ten_times_the_budget_stays_in_it(rows, fields):
    found = taken(BUDGET, rows, **fields)
    assert found["cached"] >= 10 * BUDGET
    assert PASSING * found["activation"] <= BUDGET / 4  # it is the cache that is seen
    assert found["calibrate"] < BUDGET
    assert found["reconstruct"] < BUDGET + PASSING * found["activation"]


@pytest.mark.slow
def test_the_measure_sees_a_cache_that_is_in_memory():
    found = taken(1000, 432)
    assert found["reconstruct"] > 0.9 * found["cached"]
