"""Images times one value per channel: equal to the definition, bit for bit."""

import itertools

import pytest
import torch

import qk
from qk.ops.multiply import reference
from sides import side, target

multiply = torch.ops.qk.multiply
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 67), (3, 7, 7, 64), (2, 9, 9, 24), (1, 40, 40, 40), (2, 2, 2, 1000), (2, 0, 3, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", list(itertools.product([True, False], repeat=3)))
def test_products_equal_the_definition(shape, kinds, device):
    x, gate = side(shape, device, kinds[0], 0), side((shape[0], 1, 1, shape[3]), device, kinds[1], 1, 1 / 255, 0)
    out = target(device) if kinds[2] else (None, None)
    for activation in ("none", "relu6"):
        assert torch.equal(multiply(*x, *gate, activation, *out), reference(*x, *gate, activation, *out))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_pair_of_codes(bits, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    x = codes.repeat(3).reshape(1, -1, 1).expand(1, 768, 256).contiguous(), *side((1,), device, True, 0, 0.11, 100)[1:]
    gate = codes.reshape(1, 1, 256), *side((1,), device, True, 1, 0.003, 31)[1:]
    for step, zero in ((0.001, 1), (0.13, 0), (3.0, 3), (1e-39, 2)):
        out = (*target(device, step, zero), bits)
        assert torch.equal(multiply(*x, *gate, "relu", *out), reference(*x, *gate, "relu", *out))


def test_gates_that_are_not_finite(device):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, -0.0, 0.0, 6.0], device=device)
    x, gate = odd.reshape(1, 9, 1).repeat(1, 3, 9), odd.reshape(1, 1, 9)
    out = target(device)
    args = (x, None, None, gate, None, None, "relu6", *out)
    assert torch.equal(multiply(*args), reference(*args))


def test_any_strides_work(device):
    x, gate = side((4, 6, 8, 10), device, True, 0), side((4, 6, 1, 1), device, True, 1)
    seen = x[0].permute(0, 2, 3, 1), gate[0].permute(0, 2, 3, 1)
    args = (seen[0], *x[1:], seen[1], *gate[1:], "relu", *target(device))
    assert multiply(*args).is_contiguous()
    assert torch.equal(multiply(*args), reference(*args))


def test_registration(device):
    args = (*side((2, 5, 67), device, True, 0), *side((2, 1, 67), device, False, 1), "relu", *target(device))
    torch.library.opcheck(multiply.default, args)


def test_threads_change_nothing(each_isa_and_threads):
    cpu = torch.device("cpu")
    args = (*side((3, 301, 71), cpu, True, 0), *side((3, 1, 71), cpu, True, 1), "relu", *target(cpu))
    each_isa_and_threads(lambda: [multiply(*args)])


def test_bad_input_is_named():
    cpu = torch.device("cpu")
    x, step, zero = side((2, 4, 3), cpu, True, 0)
    gate = x[:, :1]
    for args, message in [
        ((x, step, zero, x, step, zero), r"qk::multiply: gate must be \[B, 1, ..., C\]: one value for each channel"),
        ((x, step, zero, gate[:, 0], step, zero), "gate must be"),
        ((x, step, zero, gate[:, :, :2], step, zero), "gate must be"),
        ((x[0, 0], step, zero, gate[0, 0], step, zero), r"x must be \[B, ..., C\], got Byte \[3\]"),
        ((x, None, None, gate, step, zero), "x must be float32, as it has no step"),
        ((x, step, zero, gate, step, None), "gate_step and gate_zero must be given together"),
        ((x, step, zero, gate, step, zero - 8), "gate_zero must be a code from 0 to 255, got -1 at 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.multiply(*args)
