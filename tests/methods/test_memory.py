"""Calibration and reconstruction stay in the memory that they were given, with ten times as much to cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("memory.py")


def measured(budget):
    # What is freed goes back to the system at once, or the figures are those of the allocator's habits.
    habits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, SCRIPT, str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | habits)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_times_the_budget_stays_in_it():
    found = measured(22)
    assert found["cached"] > 10 * found["budget"]
    assert found["calibrate"] < found["budget"]
    assert found["reconstruct"] < found["budget"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_small_budget_takes_what_a_batch_takes_on_its_way():
    found = measured(1)
    # Each activation of a batch, its quantized copy, what a convolution needs, and one sample of learning: ten times
    # what a unit caches of a batch.
    assert found["calibrate"] < found["budget"] + 10 * found["batch"]
    assert found["reconstruct"] < found["budget"] + 10 * found["batch"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_measure_sees_a_cache_that_is_in_memory():
    found = measured(1000)
    assert found["reconstruct"] > 0.8 * found["cached"]
