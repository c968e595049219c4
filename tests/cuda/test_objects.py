"""The two shared objects: what they need of torch, and that both load where there is no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qk

PACKAGE = Path(qk.__file__).parent
BASE, CUDA = PACKAGE / "libqk_ops.so", PACKAGE / "libqk_cuda.so"
STREAM = "aoti_torch_get_current_cuda_stream"  # of libtorch_cuda; only the CUDA object may want it, weakly

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
needs_cuda_object = pytest.mark.skipif(not CUDA.exists(), reason="cuda: this build has no CUDA object")


def tool(*command: object) -> str:
    if not shutil.which(str(command[0])):
        pytest.skip(f"{command[0]}: not installed")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def undefined(library: Path) -> dict[str, str]:
    """Undefined dynamic symbols and their kind: U, or w for a weak one."""
    lines = (line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines())
    return {words[-1].split("@")[0]: words[-2] for words in lines}


def needed(library: Path) -> set[str]:
    return set(re.findall(r"NEEDED.*\[(.+?)\]", tool("readelf", "-d", library)))


@pytest.fixture(scope="module")
def stable_abi() -> set[str]:
    """Functions that the stable ABI declares for torch 2.11, the oldest that qk promises."""
    include = Path(torch.__path__[0]) / "include"
    headers = "".join(f"#include <torch/csrc/{name}>\n" for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"))
    command = ["g++", "-E", "-P", "-x", "c++", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{include}", "-"]
    if not shutil.which("g++"):
        pytest.skip("g++: not installed")
    text = subprocess.run(command, input=headers, capture_output=True, text=True, check=True).stdout
    text += (include / "torch/csrc/stable/ops.h").read_text()  # calls some that are declared elsewhere, as narrow's
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


@pytest.mark.parametrize("library", [BASE, pytest.param(CUDA, marks=needs_cuda_object)], ids=["base", "cuda"])
def test_only_the_stable_abi_of_torch_is_used(library, stable_abi):
    symbols = undefined(library)
    of_torch = {name for name in symbols if "torch" in name or "c10" in name or "aten" in name.lower()}
    assert of_torch - {STREAM} <= stable_abi
    assert {"aoti_torch_library_init_impl"} <= of_torch  # the list is not empty by mistake


def test_the_base_object_wants_nothing_of_cuda():
    assert not [name for name in undefined(BASE) if "cuda" in name.lower() and "device_type" not in name]
    assert not [name for name in needed(BASE) if "cuda" in name]


@needs_cuda_object
def test_the_cuda_object_wants_its_stream_weakly_and_no_cuda_library():
    symbols = undefined(CUDA)
    assert symbols[STREAM] == "w"
    assert not [name for name in symbols if re.match(r"(__)?cu[A-Zd]", name)]  # the runtime is linked statically
    libraries = needed(CUDA)
    assert "libtorch.so" in libraries  # brings libtorch_cuda along in a CUDA build
    assert not [name for name in libraries if "cuda" in name or "c10" in name]


@needs_cuda_object
def test_both_objects_load_and_every_operator_has_a_cuda_kernel():
    # In a process of its own: an object cannot be unloaded.
    program = f"""
import torch
torch.ops.load_library({str(BASE)!r})
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("qk::")]
assert len(names) >= 2, names
torch.ops.load_library({str(CUDA)!r})
missing = [n for n in names for key in ("CPU", "CUDA") if not torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]
assert not missing, missing
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
