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
def each_isa_and_threads():
    """same(run): run() gives the same bits on every instruction set of the CPU, with one thread and with three."""

    def same(run):
        results = []
        for isa in qk.usable_isas():
            for threads in (1, 3):
                qk.force_isa(isa)
                torch.set_num_threads(threads)
                results.append((f"{isa}, {threads} threads", [t.view(torch.uint8) for t in run()]))
        for name, tensors in results[1:]:
            for i, (one, first) in enumerate(zip(tensors, results[0][1], strict=True)):
                assert torch.equal(one, first), f"result {i} of {name} differs from {results[0][0]}"

    isa, threads = qk.active_isa(), torch.get_num_threads()
    yield same
    qk.force_isa(isa)
    torch.set_num_threads(threads)
