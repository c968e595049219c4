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
    found = measured(7)
    assert found["cached"] > 10 * found["budget"]
    # Beside the cache: one batch on its way through the model (each activation, its quantized copy, and what a
    # convolution needs) and one sample of learning. Ten batches of all that a unit caches are well above that.
    passing = 10 * found["batch"]
    assert found["calibrate"] < found["budget"] + passing
    assert found["reconstruct"] < found["budget"] + passing
    assert passing + found["budget"] < 0.75 * found["cached"]  # so that a cache in memory would fail


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_measure_sees_a_cache_that_is_in_memory():
    found = measured(1000)
    assert found["reconstruct"] > 0.8 * found["cached"]
