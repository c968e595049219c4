"""Pools over codes: equal to the definition, bit for bit."""

import pytest
import torch

import qk
from qk.ops.pool import reference

pool = torch.ops.qk.pool
#           kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 3), (1, 1), (1, 1), (1, 1), False),
    ((3, 2), (2, 3), (1, 0), (1, 1), True),
    ((1, 1), (3, 2), (0, 0), (1, 1), True),
    ((7, 9), (7, 9), (0, 0), (1, 1), False),
    ((5, 4), (3, 3), (2, 2), (1, 1), True),
]
SPREAD = [((2, 3), (1, 2), (1, 1), (3, 2), False), ((3, 2), (2, 1), (1, 1), (2, 4), True)]
SHAPES = [(1, 7, 9, 1), (2, 8, 9, 3), (1, 9, 11, 17), (1, 7, 10, 31), (2, 7, 9, 64), (1, 8, 9, 67), (1, 7, 9, 200)]


def problem(shape, device, seed=0, step=0.02, zero=77):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device)
    return codes, torch.tensor([step], device=device), torch.tensor([zero], dtype=torch.int32, device=device)


def target(device, step=0.0217, zero=93):
    return torch.tensor([step], device=device), torch.tensor([zero], dtype=torch.int32, device=device)


@pytest.mark.parametrize("window", WINDOWS + SPREAD)
@pytest.mark.parametrize("shape", SHAPES)
def test_maxima_equal_the_definition(shape, window, device):
    args = (*problem(shape, device), "max", *window)
    assert torch.equal(pool(*args), reference(*args))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [(True, None), (False, None), (True, 7)])
def test_averages_equal_the_definition(shape, window, count, device):
    for out in ((None, None), target(device)):
        args = (*problem(shape, device), "average", *window, *count, "none", *out)
        assert torch.equal(pool(*args), reference(*args))


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (16, 16), (17, 33), (56, 56)])
@pytest.mark.parametrize("channels", [5, 64, 100])
def test_the_whole_image(size, channels, device):
    x = problem((2, *size, channels), device)
    x[0][0] = 255  # the largest sum
    for activation, out in (("none", (None, None)), ("relu", target(device)), ("relu6", (*target(device, 1e-3, 1), 4))):
        args = (*x, "average", size, size, (0, 0), (1, 1), False, True, None, activation, *out)
        assert torch.equal(pool(*args), reference(*args))
    assert torch.equal(qk.ops.pool(*x, "max"), x[0].amax((1, 2), keepdim=True))


@pytest.mark.parametrize("steps", [(3e38, 0.1), (1e-39, 1e-39), (1e20, 1e-20), (1.0, 3e38)])
def test_extreme_steps(steps, device):
    args = (*problem((1, 6, 6, 70), device, step=steps[0]), "average", (3, 3), (1, 1), (1, 1), (1, 1), False, False)
    args = (*args, None, "none", *target(device, steps[1]))
    assert torch.equal(pool(*args), reference(*args))


def test_any_strides_work(device):
    x, step, zero = problem((2, 20, 8, 10), device)
    seen = x.permute(0, 2, 3, 1)[:, ::2]
    for mode in ("max", "average"):
        args = (seen, step, zero, mode, (2, 2), (1, 1))
        assert pool(*args).is_contiguous()
        assert torch.equal(pool(*args), reference(*args))


def test_nothing_to_pool(device):
    for shape in ((0, 4, 4, 8), (2, 4, 4, 0)):
        for mode in ("max", "average"):
            args = (*problem(shape, device), mode, (2, 2), (2, 2))
            assert pool(*args).shape == (shape[0], 2, 2, shape[3])


@pytest.mark.parametrize("mode", ["max", "average"])
def test_registration(mode, device):
    args = (*problem((2, 7, 9, 5), device), mode, (3, 3), (2, 2), (1, 1), (1, 1), True)
    torch.library.opcheck(pool.default, args)
    if mode == "average":
        torch.library.opcheck(pool.default, (*args, False, None, "relu", *target(device)))


def test_threads_change_nothing(each_isa_and_threads):
    x = problem((2, 40, 40, 96), torch.device("cpu"))
    for mode in ("max", "average"):
        each_isa_and_threads(lambda mode=mode: [pool(*x, mode, (3, 3), (2, 2), (1, 1))])


def test_bad_input_is_named():
    x, step, zero = problem((2, 7, 9, 4), torch.device("cpu"))
    two = (2, 2)
    for args, message in [
        ((x.int(), step, zero, "max", two, two), r"qk::pool: x must be uint8 codes \[B, H, W, C\] \(NHWC\), got Int"),
        ((x[0], step, zero, "max", two, two), "x must be uint8 codes"),
        ((x, step, zero, "sum", two, two), "mode must be max or average, got sum"),
        ((x, step, zero, "max", (0, 2), two), "kernel must be positive and below 2.31, got 0"),
        ((x, step, zero, "max", two, (0, 2)), "stride must be positive"),
        ((x, step, zero, "max", two, two, (-1, 0)), "padding must be 0 or more"),
        ((x, step, zero, "max", two, two, two), "padding must be at most half of the kernel, 2, got 2"),
        ((x, step, zero, "max", (8, 2), two), "H of x must be at least as large as the kernel's reach 8 with padding"),
        ((x, step, zero, "max", two, two, (0, 0), (1, 9)), "W of x must be at least as large as the kernel's reach 10"),
        ((x, step, zero, "average", two, two, (0, 0), two), "dilation must be 1 for mode average"),
        ((x, step, zero, "average", two, two, (0, 0), (1, 1), False, True, 0), "divisor_override must be positive"),
        ((x, step, zero, "max", two, two, (0, 0), (1, 1), False, True, 3), "divisor_override must be left out"),
        ((x, -step, zero, "max", two, two), "x_step must be positive and finite"),
        ((x, step, zero - 78, "max", two, two), "x_zero must be a code from 0 to 255, got -1 at 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.pool(*args)
    with pytest.raises(RuntimeError, match="out_step must be left out for mode max"):
        qk.ops.pool(x, step, zero, "max", two, out_step=step, out_zero=zero)
