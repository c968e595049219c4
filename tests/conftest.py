"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch

import qk
from qk import _native

_ISAS = ("generic", "avx2", "avx512vnni")


@pytest.fixture(params=[*_ISAS, "cuda"])
def device(request):
    """The device of a kernel's test: the CPU once for each instruction set that it has, then CUDA."""
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
def two_threads():
    """Runs a test with two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
