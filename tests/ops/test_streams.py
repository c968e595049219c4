"""Every operator gives the same bits again: in a second call, on another stream of CUDA, and from a recorded graph."""

import random

import pytest
import torch

from test_fuzz import EXPECTED, LIKELY, like_any, outputs, registered

EXAMPLES = 16


def moved(value, device):
    if isinstance(value, list):
        return [moved(x, device) for x in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def runs(device, monkeypatch):
    """Of an operator: calls without arguments that have given a result once, with that result."""
    prepack = torch.ops.qk.prepack  # what makes arguments packs weights too, in the order of the device
    monkeypatch.setattr(torch.ops.qk, "prepack", lambda *args: prepack(*(moved(x, device) for x in args)))

    def made(op):
        operator, found = prepack if op == "prepack" else getattr(torch.ops.qk, op), []
        for seed in range(EXAMPLES):
            arguments = LIKELY.get(op, like_any)(random.Random(seed), operator.default._schema)
            arguments = {name: moved(value, device) for name, value in arguments.items()}

            def run(arguments=arguments):
                return outputs(operator(**arguments))

            try:
                found.append((run, run()))
            except EXPECTED:
                continue
        assert len(found) >= EXAMPLES // 4
        return found

    return made


def same(got, want):
    pairs = zip(got, want, strict=True)
    return all(torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("op", registered())
def test_a_second_call_gives_the_same_bits(op, runs):
    for run, want in runs(op):
        assert same(run(), want)


@pytest.mark.parametrize("op", registered())
def test_other_streams_and_graphs_give_the_same_bits(op, device, runs):
    if device.type != "cuda":
        pytest.skip("cuda: the CPU has no streams")
    side = torch.cuda.Stream()
    for run, want in runs(op):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert same(run(), want)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            recorded = run()
        for _ in range(2):
            for result in recorded:
                result.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(recorded, want)
