"""What the tests of BRECQ share: the demo's network with its data, and a run that is interrupted."""

import itertools

import pytest

from methods.digits import Digits
from qk.methods import brecq, reconstruct


@pytest.fixture(scope="module")
def digits(request, one_thread):
    pytest.importorskip("sklearn")
    return Digits(request.config.cache.mkdir("qk-digits"))


@pytest.fixture
def batches(digits):
    return list(digits.images[:256].split(64))


@pytest.fixture
def interrupted(batches, monkeypatch):
    """Reconstructs until a step of learning, counted from 1 over all units."""
    step = brecq.Learner.step

    def until(number, p, recipe):
        calls = itertools.count(1)

        def counted(self, *args):
            if next(calls) == number:
                raise KeyboardInterrupt
            return step(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(brecq.Learner, "step", counted)
            with pytest.raises(KeyboardInterrupt):
                reconstruct(p, batches, recipe, progress="off")

    return until
