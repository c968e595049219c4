"""What is compiled for an instruction set runs only where that set was chosen."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
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
