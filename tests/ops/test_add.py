"""Sums of codes or values: equal to the definition, bit for bit."""

import itertools

import pytest
import torch

import qk
from qk.ops.add import reference
from sides import side, target

add = torch.ops.qk.add
SHAPES = [(1,), (63,), (64,), (65,), (2, 3, 5, 67), (100_003,), (7, 0), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", list(itertools.product([True, False], repeat=3)))
def test_sums_equal_the_definition(shape, kinds, device):
    a, b = side(shape, device, kinds[0], 0), side(shape, device, kinds[1], 1, 0.05, 200)
    out = target(device) if kinds[2] else (None, None)
    assert torch.equal(add(*a, *b, "none", *out), reference(*a, *b, "none", *out))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_activations_and_widths(activation, bits, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    a = codes.repeat_interleave(256), *side((1,), device, True, 0, 0.11, 100)[1:]
    b = codes.repeat(256), *side((1,), device, True, 1, 0.023, 31)[1:]
    for step in (0.001, 0.13, 3.0):
        out = (*target(device, step, 1), bits)
        assert torch.equal(add(*a, *b, activation, *out), reference(*a, *b, activation, *out))
    assert torch.equal(add(*a, *b, activation), reference(*a, *b, activation))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_values_that_are_not_finite(activation, device):
    odd = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, -0.0, 0.0, 6.0, 5.9999995, 1e10, -1e10]
    pairs = torch.tensor(list(itertools.product(odd, repeat=2)), device=device)
    a, b = (pairs[:, 0].contiguous(), None, None), (pairs[:, 1].contiguous(), None, None)
    for step in (0.1, 1e-39, 3e38):
        out = target(device, step)
        assert torch.equal(add(*a, *b, activation, *out), reference(*a, *b, activation, *out))
    ours, wanted = add(*a, *b, activation), reference(*a, *b, activation)
    assert torch.equal(ours.nan_to_num(nan=123.0), wanted.nan_to_num(nan=123.0))


@pytest.mark.parametrize("steps", [(3e38, 3e38, 0.1), (1e-39, 2e-39, 1e-39), (1.0, 1e30, 1e-20), (1e38, 1.0, 1e38)])
def test_extreme_steps(steps, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    a = codes.repeat_interleave(256), *side((1,), device, True, 0, steps[0], 100)[1:]
    b = codes.repeat(256), *side((1,), device, True, 1, steps[1], 31)[1:]
    out = target(device, steps[2], 128)
    assert torch.equal(add(*a, *b, "none", *out), reference(*a, *b, "none", *out))


def test_any_strides_work(device):
    a, b = side((4, 6, 8, 10), device, True, 0), side((4, 6, 8, 10), device, True, 1)
    seen = [x.permute(0, 2, 3, 1)[:, ::2] for x in (a[0], b[0])]
    out = add(seen[0], *a[1:], seen[1], *b[1:], "relu", *target(device))
    assert out.is_contiguous()
    assert torch.equal(out, reference(seen[0], *a[1:], seen[1], *b[1:], "relu", *target(device)))


@pytest.mark.parametrize("codes", [True, False])
def test_registration(codes, device):
    out = target(device) if codes else (None, None)
    args = (*side((5, 67), device, codes, 0), *side((5, 67), device, True, 1), "relu", *out)
    torch.library.opcheck(add.default, args)


def test_threads_change_nothing(each_isa_and_threads):
    cpu = torch.device("cpu")
    args = (*side((200_001,), cpu, True, 0), *side((200_001,), cpu, True, 1), "relu", *target(cpu))
    each_isa_and_threads(lambda: [add(*args)])


def test_bad_input_is_named():
    cpu = torch.device("cpu")
    a, step, zero = side((2, 3), cpu, True, 0)
    for args, message in [
        ((a.int(), step, zero, a, step, zero), r"qk::add: a must be uint8 codes, as it has a step, got Int \[2, 3\]"),
        ((a, None, None, a, step, zero), "a must be float32, as it has no step, got Byte"),
        ((a, step, None, a, step, zero), "a_step and a_zero must be given together, got only one"),
        ((a, step, zero, a[:1], step, zero), r"b must be of the shape of a, Byte \[2, 3\], got Byte \[1, 3\]"),
        ((a, -step, zero, a, step, zero), "a_step must be positive and finite"),
        ((a, step, zero, a, step, zero + 300), "b_zero must be a code from 0 to 255, got 307 at 0"),
        ((a, step.expand(2), zero, a, step, zero), "a_step must be one value"),
        ((a, step, zero, a, step, zero, "tanh"), "activation must be none, relu or relu6, got tanh"),
        ((a, step, zero, a, step, zero, "none", step), "out_step and out_zero must be given together"),
        ((a, step, zero, a, step, zero, "none", step, zero, 2), "out_zero must be a code from 0 to 3, got 7 at 0"),
        ((a, step, zero, a, step, zero, "none", step, zero, 9), "out_bits must be a width from 2 to 8, got 9"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.add(*args)
