"""Registers, shared memory, stack and spills of every kernel, as the build's ptxas reported them, against a budget.

budget.json holds "registers, shared bytes" by kernel and architecture. A kernel that grows beyond it or is not in it
fails; after a change that is meant, write it again: python tests/cuda/test_resources.py > tests/cuda/budget.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
KERNEL = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)


def reports() -> list[Path]:
    """What csrc/cuda/keep_resources.py kept of the newest build."""
    builds = {path.parent for path in ROOT.glob("build/**/qk_cuda.dir/csrc/cuda/*.ptxas")}
    newest = max(builds, key=lambda folder: max(p.stat().st_mtime for p in folder.glob("*.ptxas")), default=None)
    return sorted(newest.glob("*.ptxas")) if newest else []


def short(name: str) -> str:
    """convolve_kernel<Tile<8, 4, 1>, 4> of the demangled signature."""
    name = re.sub(r"\(anonymous namespace\)::|\b(qk|cuda)::|\(int\)|\(bool\)|^void ", "", name)
    return name.split("(")[0]


def kernels() -> dict[tuple[str, str], dict[str, int]]:
    """(file: kernel, architecture) -> registers, stack, spills, shared memory in bytes."""
    found = {}
    for path in reports():
        text = path.read_text()
        if not shutil.which("c++filt"):
            pytest.skip("c++filt: not installed")
        parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", text)[1:]
        for mangled, arch, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            use = KERNEL.search(body)
            demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
            shared = re.search(r"(\d+) bytes smem", use["rest"])
            found[f"{path.name.split('.')[0]}: {short(demangled)}", arch] = {
                "registers": int(use["registers"]),
                "shared": int(shared[1]) if shared else 0,
                "stack": int(use["stack"]),
                "spills": int(use["stores"]) + int(use["loads"]),
            }
    return found


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, str], dict[str, int]]:
    found = kernels()
    if not found:
        pytest.skip("cuda: no kernels were built here")
    return found


def test_no_kernel_spills_or_has_a_stack(built):
    assert not {key: use for key, use in built.items() if use["stack"] or use["spills"]}


def test_products_of_warp_groups_do_not_wait_for_each_other(built):
    """ptxas says so where it cannot prove that their registers are left alone."""
    assert not [line for path in reports() for line in path.read_text().splitlines() if "serialized" in line]


def test_no_kernel_grew_beyond_its_budget(built):
    budget = json.loads(BUDGET.read_text())
    grown = {}
    for (name, arch), use in built.items():
        allowed = budget.get(name, {}).get(arch)
        if allowed is None or use["registers"] > allowed[0] or use["shared"] > allowed[1]:
            grown[name, arch] = (use, allowed)
    assert not grown, "write budget.json again if this is meant (see the top of this file)"


def test_the_budget_names_no_kernel_that_is_gone(built):
    assert not set(json.loads(BUDGET.read_text())) - {name for name, _ in built}


if __name__ == "__main__":
    table: dict[str, dict[str, list[int]]] = {}
    for (name, arch), use in sorted(kernels().items()):
        table.setdefault(name, {})[arch] = [use["registers"], use["shared"]]
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(archs)}" for name, archs in table.items())
    print("{\n" + rows + "\n}")
