"""Dynamic rows: each kernel finds the definition's ranges and codes, bit for bit."""

import pytest
import torch

import qk
from qk.ops.quantize_rows import reference

quantize_rows = torch.ops.qk.quantize_rows
INF, NAN, LARGEST = float("inf"), float("nan"), torch.finfo(torch.float32).max


def problem(shape, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if x.numel():
        x = x * torch.logspace(-30, 30, x[..., :1].numel()).reshape(*x.shape[:-1], 1)  # every row its own size
    return x.to(device)


def assert_defined(x, bits):
    for ours, theirs in zip(quantize_rows(x, bits), reference(x, bits), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "shape", [(1,), (67,), (5, 67), (3, 5, 32), (2, 33), (200, 3), (2, 8193), (0, 5), (5, 0), (3, 1)]
)
def test_codes_steps_and_zeros_equal_the_definition(shape, bits, device):
    assert_defined(problem(shape, device), bits)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_row_of_one_sign_has_its_zero_at_an_end(bits, device):
    x = problem((6, 67), device).abs()
    assert (quantize_rows(x, bits)[2] == 0).all()
    assert (quantize_rows(-x, bits)[2] == 2**bits - 1).all()
    assert_defined(x, bits)
    assert_defined(-x, bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_come_back_within_half_a_step(bits, device):
    # The range is stretched to 0 and its ends meet codes up to a rounding of zero: half a step, and another half where
    # the shifted range clips; 1e-5 for the roundings of step, its reciprocal and the products.
    x = torch.randn(50, 67, device=device)
    codes, step, zero = quantize_rows(x, bits)
    error = (torch.ops.qk.dequantize(codes, step, zero) - x).abs()
    assert (error <= step.unsqueeze(-1) * (1 + 1e-5)).all()
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert (error <= step.unsqueeze(-1) * (0.5 + 1e-4))[inside].all()


def test_a_row_of_zeros_has_step_one(device):
    codes, step, zero = quantize_rows(torch.tensor([[0.0, -0.0], [NAN, INF]], device=device), 4)
    assert (step.tolist(), zero.tolist(), codes.tolist()) == ([1, 1], [0, 0], [[0, 0], [0, 15]])


def test_values_that_are_not_finite_leave_the_range_alone(device):
    row = [1.0, -2.0, 3.0] * 20
    clean = quantize_rows(torch.tensor(row, device=device), 4)
    dirty = quantize_rows(torch.tensor([*row, NAN, INF, -INF], device=device), 4)
    assert torch.equal(dirty[0][:-3], clean[0])
    assert dirty[0][-3:].tolist() == [int(clean[2]), 15, 0]
    assert (dirty[1], dirty[2]) == (clean[1], clean[2])


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_the_ends_of_float32_have_a_usable_step(bits, device):
    tiny = 2.0**-126
    rows = [[LARGEST, -LARGEST], [LARGEST, 1.0], [1e-45, 0], [-1e-45, 1e-45], [tiny, 0], [-3e-39, 5e-40], [tiny, -tiny]]
    x = torch.tensor(rows, device=device)
    _, step, _ = quantize_rows(x, bits)
    assert (step >= tiny).all()
    assert step.isfinite().all()
    assert (1 / step).isfinite().all()
    assert_defined(x, bits)


def test_any_strides_work(device):
    x = problem((4, 6, 8, 10), device)
    for seen in (x.permute(0, 2, 3, 1), x[..., ::2], x[1:, :, 1:], x[:1].expand(3, 6, 8, 10)):
        assert_defined(seen, 8)


@pytest.mark.parametrize("shape", [(5, 67), (7,), (0, 3)])
def test_registration(shape, device):
    torch.library.opcheck(quantize_rows.default, (problem(shape, device), 4))


def test_bad_input_is_named():
    x = torch.ones(4, 6)
    for args, message in [
        ((x.double(), 4), r"qk::quantize_rows: x must be Float, got Double \[4, 6\]"),
        ((x[0, 0], 4), r"qk::quantize_rows: x must be \[..., cols\], got Float \[\]"),
        ((x, 1), "bits must be a width from 2 to 8, got 1"),
        ((x, 9), "bits must be a width from 2 to 8, got 9"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.quantize_rows(*args)
