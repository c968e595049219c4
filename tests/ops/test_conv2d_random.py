"""conv2d equals its definition for any geometry, on any number of threads."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qk
from qk.ops.conv2d import reference


@st.composite
def problems(draw):
    """Arguments of both, and what differs between them."""
    kind = draw(st.sampled_from(["depthwise", "plain", "plain", "groups"]))
    if kind == "depthwise":
        groups, inputs, outputs = draw(st.integers(2, 150)), 1, 1
    elif kind == "groups":
        groups, inputs, outputs = draw(st.integers(2, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    else:
        groups, inputs, outputs = 1, draw(st.integers(1, 70)), draw(st.integers(1, 70))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (3, 2)]))
    padding = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [draw(st.integers(max(1, r - 2 * p), 33)) for r, p in zip(reach, padding, strict=True)]
    batch = draw(st.integers(1, 3))
    bits, x_bits = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([4, 8]))
    seed = draw(st.integers(0, 2**31))
    result = draw(st.sampled_from(["float", "codes", "codes", "six bits"]))
    return {
        "x": (batch, *size, groups * inputs),
        "weight": (groups * outputs, *kernel, inputs),
        "places": {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        "bits": bits,
        "x_bits": x_bits,
        "seed": seed,
        "result": result,
        "activation": draw(st.sampled_from(["none", "relu", "relu6"])),
        "residual": draw(st.sampled_from([None, None, "float", "codes"])),
        "bias": draw(st.booleans()),
        "threads": draw(st.integers(1, 8)),
    }


def random_epilogue(p, random, shape):
    more = {"activation": p["activation"]}
    if p["result"] != "float":
        bits = 8 if p["result"] == "codes" else 6
        more |= {"out_step": 0.5 + torch.rand(1, generator=random) * 20, "out_bits": bits}
        more["out_zero"] = torch.randint(0, 2**bits, (1,), generator=random, dtype=torch.int32)
    if p["residual"] == "float":
        more["residual"] = torch.randn(shape, generator=random) * 100
    if p["residual"] == "codes":
        more["residual"] = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        more |= {"residual_step": torch.tensor([3.1]), "residual_zero": torch.tensor([77], dtype=torch.int32)}
    return more


@pytest.mark.parametrize("isa", qk.usable_isas())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(p=problems())
def test_any_convolution_is_its_definition(isa, p, make_weight):
    random = torch.Generator().manual_seed(p["seed"])
    w = make_weight(p["weight"], p["bits"], groups=p["places"]["groups"], seed=p["seed"])
    x = torch.randint(0, 2 ** p["x_bits"], p["x"], generator=random, dtype=torch.uint8)
    x_step = 0.01 + torch.rand(1, generator=random)
    x_zero = torch.randint(0, 2 ** p["x_bits"], (1,), generator=random, dtype=torch.int32)
    bias = torch.randn(p["weight"][0], generator=random) * 100 if p["bias"] else None
    fixed = (x, x_step, x_zero)
    shape = reference(*fixed, w.codes, w.zero, w.step, bias, **p["places"]).shape
    more = random_epilogue(p, random, shape)
    want = reference(*fixed, w.codes, w.zero, w.step, bias, **p["places"], **more)
    before, threads = qk.active_isa(), torch.get_num_threads()
    try:
        qk.force_isa(isa)
        torch.set_num_threads(p["threads"])
        kernel = p["weight"][1:3]
        got = qk.ops.conv2d(
            *fixed, w.prepacked, w.step, bias, w.bits, kernel, x_bits=p["x_bits"], **p["places"], **more
        )
    finally:
        qk.force_isa(before)
        torch.set_num_threads(threads)
    assert torch.equal(got, want)
