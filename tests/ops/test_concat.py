"""Codes side by side: equal to the definition, bit for bit."""

import pytest
import torch

import qk
from qk.ops.concat import reference

concat = torch.ops.qk.concat


def one(value, device, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype, device=device)


def problem(shape, channels, device, steps=(0.02, 0.05, 0.001), zeros=(7, 0, 255), out=(0.05, 0), bits=8):
    g = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 256, (*shape, c), generator=g, dtype=torch.uint8).to(device) for c in channels]
    n = len(channels)
    return (
        codes,
        [one(step, device) for step in steps[:n]],
        [one(zero, device, torch.int32) for zero in zeros[:n]],
        one(out[0], device),
        one(out[1], device, torch.int32),
        bits,
    )


@pytest.mark.parametrize("channels", [(1,), (64, 32), (3, 5, 7), (96, 33, 200), (0, 5), (256,), (15, 16, 17)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 9, 11), (0, 4)])
def test_codes_equal_the_definition(shape, channels, device):
    args = problem(shape, channels, device)
    assert torch.equal(concat(*args), reference(*args))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("out", [(0.02, 1), (0.3, 3), (1e-39, 0), (3e38, 2)])
def test_every_code_comes_to_another_step(bits, out, device):
    args = problem((), (0,), device, out=out, bits=bits)
    codes = [torch.arange(256, dtype=torch.uint8, device=device)]
    assert torch.equal(concat(codes, *args[1:]), reference(codes, *args[1:]))


def test_codes_of_the_same_step_are_copied(device):
    codes, *_ = problem((4, 5), (40, 24), device)
    step, zero = one(0.7, device), one(9, device, torch.int32)
    assert torch.equal(concat(codes, [step] * 2, [zero] * 2, step, zero), torch.cat(codes, -1))


def test_any_strides_work(device):
    codes, *rest = problem((4, 6, 8), (10, 12), device)
    seen = [c.permute(1, 0, 2, 3)[:, :, ::2] for c in codes]
    assert torch.equal(concat(seen, *rest), reference(seen, *rest))


def test_registration(device):
    torch.library.opcheck(concat.default, problem((2, 3), (5, 6), device))


def test_threads_change_nothing(each_isa_and_threads):
    args = problem((5, 70, 70), (33, 64), torch.device("cpu"))
    each_isa_and_threads(lambda: [concat(*args)])


def test_bad_input_is_named():
    codes, steps, zeros, step, zero, _ = problem((2, 3), (4, 5), torch.device("cpu"))
    for args, message in [
        (([], [], [], step, zero), "qk::concat: codes must be one tensor or more, got none"),
        ((codes, steps[:1], zeros, step, zero), "steps must be one for each tensor of codes, got 1"),
        ((codes, steps, [], step, zero), "zeros must be one for each tensor of codes, got 0"),
        (([codes[0], codes[1].int()], steps, zeros, step, zero), r"codes\[1\] must be Byte, got Int \[2, 3, 5\]"),
        (([codes[0], codes[1][:, :2]], steps, zeros, step, zero), r"codes\[1\] must be of the shape of codes\[0\]"),
        ((codes, [steps[0], -steps[1]], zeros, step, zero), r"codes\[1\]_step must be positive and finite"),
        ((codes, steps, zeros, step, zero + 256), "out_zero must be a code from 0 to 255, got 256 at 0"),
        ((codes, steps, zeros, step, zero, 1), "out_bits must be a width from 2 to 8, got 1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.concat(*args)
