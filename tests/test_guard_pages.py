"""No kernel reads beyond its arguments, before or behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qk
from guarded import Guarded

TESTS = Path(__file__).parent


def run(command):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize("isa", qk.usable_isas())
def test_no_operator_reads_beyond_its_arguments(isa):
    command = [sys.executable, str(TESTS / "guarded.py"), isa, "20"]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    lines = done.stdout.splitlines() or ["nothing"]
    assert lines[-1] == "all returned", (
        f"the last call was {lines[-1]}: status {done.returncode}\n{done.stderr[-2000:]}"
    )


@pytest.mark.parametrize(("at_end", "index"), [(True, 100), (False, -1)])
def test_the_guard_kills_who_reads_beyond(at_end, index):
    code = f"""if True:
        import ctypes, torch
        from guarded import Guarded
        x = Guarded().copy(torch.zeros(100, dtype=torch.uint8), {at_end})
        assert x.sum() == 0
        ctypes.c_char.from_address(x.data_ptr() + {index}).value"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": str(TESTS)}
    )
    assert done.returncode == -11


def test_a_guarded_copy_has_the_values():
    guarded = Guarded()
    x = torch.randn(7, 5)
    for at_end in (True, False):
        assert torch.equal(guarded.copy(x.t(), at_end), x.t())
    guarded.close()
