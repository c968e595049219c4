"""What is compiled for an instruction set runs only where that set was chosen."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qk import _core

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni", "amx"])
def test_no_other_code_can_be_linked_with_a_function_of_this_set(isa):
    """Of an inline function in two objects the linker keeps one: perhaps the one that only newer processors can run."""
    builds = ROOT.glob(f"build/**/simd_{isa}.dir/csrc/cpu/gemm.simd.cpp.o")
    newest = max(builds, key=lambda path: path.stat().st_mtime, default=None)
    if not newest or not shutil.which("nm"):
        pytest.skip(f"{isa}: not compiled here, or no nm to look at it")
    command = ["nm", "--demangle", "--defined-only", "--extern-only", *newest.parent.glob("*.o")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^[0-9a-f]+ \w (.+)$", listing, re.MULTILINE)
    assert f"qk::cpu::{isa}::gemm(qk::GemmArgs const&)" in names
    assert [name for name in names if not name.startswith(f"qk::cpu::{isa}::")] == []


@pytest.mark.parametrize(("wanted", "answer"), [("generic", "generic\n"), ("sse9", None)])
def test_the_environment_chooses_at_import_and_only_what_there_is(wanted, answer):
    done = subprocess.run(
        [sys.executable, "-c", "import qk; print(qk.active_isa())"],
        env=os.environ | {"QK_ISA": wanted},
        capture_output=True,
        text=True,
    )
    if answer:
        assert done.stdout == answer
    else:
        assert re.search(r"qk: QK_ISA must name an instruction set of this machine \(.*\), got sse9", done.stderr)


@pytest.mark.parametrize("rounds", [-1, 2**40 + 1])
def test_a_probe_counts_its_rounds(rounds):
    assert _core.probe_products(3) % 3 == 0
    with pytest.raises(RuntimeError, match=rf"qk: rounds must be from 0 to 2\^40, got {rounds}"):
        _core.probe_products(rounds)
