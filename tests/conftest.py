"""Fixtures of all tests."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch

import qk
from qk import _native
from threads import threads

prepack = import_module("qk.ops.prepack")  # the name in qk.ops is its function
_ISAS = ("generic", "avx2", "avx512vnni", "amx")


class _Emulated:
    """The CUDA kernels, compiled for the host, in place of the CPU kernels (tests/cuda/emulated)."""

    def __init__(self):
        built = Path(__file__).parents[1].glob("build/**/libqk_emulated.so")
        self.library = max(built, key=lambda path: path.stat().st_mtime, default=None)
        if self.library:
            torch.ops.load_library(str(self.library))

    def __enter__(self):
        self.layout = prepack.packed_layout
        prepack.packed_layout = lambda shape, bits, groups, k_groups, _, winograd: self.layout(
            shape, bits, groups, k_groups, True, winograd
        )
        self.overrides = torch.library.Library("qk", "IMPL")
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("qk_emulated::"):
                kernel = getattr(torch.ops.qk_emulated, name.removeprefix("qk_emulated::")).default
                self.overrides.impl(name.removeprefix("qk_emulated::"), kernel, "CPU", allow_override=True)

    def __exit__(self, *_):
        self.overrides._destroy()
        prepack.packed_layout = self.layout

    @contextmanager
    def of(self, architecture: int):
        """As on a GPU of sm_80, which has products of 4 bits, or of sm_90, with groups of warps. Else it is sm_120."""
        emulate = ctypes.CDLL(str(self.library)).emulate_architecture
        emulate(architecture)
        try:
            with self:
                yield
        finally:
            emulate(120)


@pytest.fixture(scope="module")
def one_thread():
    """For `usefixtures`: small networks lose with more, and the definition's float64 convolution is slow on many."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def emulated():
    return _Emulated()


@pytest.fixture(params=[*_ISAS, "emulated", "cuda"])
def device(request, emulated):
    """The device of a kernel's test: the CPU once for each instruction set that it has, CUDA emulated, then CUDA."""
    if request.param == "emulated":
        if not emulated.library:
            pytest.skip("emulated: the target qk_emulated was not built")
        if "float64" in request.node.name:
            pytest.skip("emulated: a fiber for each of a hundred thousand rows takes minutes")
        with emulated:
            yield torch.device("cpu")
        return
    if request.param == "cuda":
        if _native.cuda_error or not torch.cuda.is_available():
            pytest.skip(f"cuda: {_native.cuda_error or 'no usable GPU'}")
        yield torch.device("cuda")
        return
    if request.param not in qk.usable_isas():
        pytest.skip(f"{request.param}: this CPU does not have it")
    before = qk.active_isa()
    qk.force_isa(request.param)
    yield torch.device("cpu")
    qk.force_isa(before)


@pytest.fixture
def each_isa_and_threads():
    """same(run): run() gives the same bits on every instruction set of the CPU, with one thread and with three."""

    def same(run):
        results = []
        for isa in qk.usable_isas():
            for count in (1, 3):
                qk.force_isa(isa)
                with threads(count):
                    results.append((f"{isa}, {count} threads", [t.view(torch.uint8) for t in run()]))
        for name, tensors in results[1:]:
            for i, (one, first) in enumerate(zip(tensors, results[0][1], strict=True)):
                assert torch.equal(one, first), f"result {i} of {name} differs from {results[0][0]}"

    isa = qk.active_isa()
    yield same
    qk.force_isa(isa)


@pytest.fixture
def two_threads():
    """Runs a test with two threads, whatever the machine has."""
    with threads(2):
        yield
