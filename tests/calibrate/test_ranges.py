"""Ranges from data."""

import pytest
import torch

from qk import ops
from qk.calibrate import ranges

ROW = torch.tensor([[-0.9, -0.42, -0.2, -0.11, -0.03, 0.02, 0.07, 0.15, 0.24, 0.31, 0.5, 1.4]])


def error(rows, step, zero, bits, power=2.4):
    return ops.range_error(rows, step[:, None], zero[:, None], bits, power)[:, 0]


@pytest.mark.parametrize(
    ("bits", "shrink", "step", "zero", "mean"),
    [(2, 14, 0.659333, 1, 0.01757870), (3, 3, 0.31871429, 3, 0.00385473), (4, 0, 0.15333333, 6, 0.00047730)],
)
def test_mse_finds_the_worked_numbers(bits, shrink, step, zero, mean):
    found_step, found_zero = ranges.mse(ROW, bits)
    assert found_step.item() == pytest.approx(step, rel=1e-6)
    assert found_step.item() == pytest.approx(2.3 * (1 - 0.01 * shrink) / (2**bits - 1), rel=1e-6)
    assert found_zero.item() == zero
    assert error(ROW, found_step, found_zero, bits).item() / ROW.numel() == pytest.approx(mean, rel=1e-5)


def test_the_unshrunk_range_is_worse_at_two_bits():
    step, zero = ranges.minmax(ROW, 2)
    assert step.item() == pytest.approx(0.766667, rel=1e-6)
    assert error(ROW, step, zero, 2).item() / ROW.numel() == pytest.approx(0.02230891, rel=1e-5)


def test_a_tie_keeps_the_larger_range():
    rows = torch.tensor([[0.0, 3.0, 6.0, 9.0]])
    step, _ = ranges.mse(rows, 2)
    assert step.item() == 3.0
    step, _ = ranges.mse(torch.zeros(1, 4), 2, low=torch.tensor([0.0]), high=torch.tensor([3.0]))
    assert step.item() == 1.0  # every candidate has no error


@pytest.mark.parametrize("choose", [ranges.minmax, ranges.percentile, ranges.mse])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_always_holds_zero(choose, symmetric):
    rows = torch.stack([torch.linspace(3, 5, 33), torch.linspace(-5, -3, 33)])
    for bits in (2, 4, 8):
        step, zero = choose(rows, bits, symmetric)
        assert step.dtype == torch.float32
        assert zero.dtype == torch.int32
        assert (step > 0).all()
        assert ((zero >= 0) & (zero <= 2**bits - 1)).all()
        if symmetric:
            assert (zero == 2 ** (bits - 1)).all()
        else:
            assert zero.tolist() == [0, 2**bits - 1]


@pytest.mark.parametrize("choose", [ranges.minmax, ranges.percentile, ranges.mse])
def test_a_row_without_extent_gets_step_one(choose):
    rows = torch.zeros(3, 7)
    rows[1, 0] = 1e-40  # its reciprocal is no float32
    rows[2, 0] = 1.0
    step, zero = choose(rows, 4)
    assert step[:2].tolist() == [1.0, 1.0]
    assert step[2] > 0
    assert zero.tolist() == [0, 0, 0]


def test_a_huge_range_does_not_overflow():
    step, _ = ranges.minmax(torch.tensor([[-3e38, 3e38]]), 8)
    assert torch.isfinite(step).all()


def test_symmetric_minmax_clips_nothing():
    rows = torch.randn(5, 67, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        step, zero = ranges.minmax(rows, bits, symmetric=True)
        assert (rows / step[:, None] + zero[:, None] <= 2**bits - 1 + 1e-4).all()
        assert (rows / step[:, None] + zero[:, None] >= -1e-4).all()


def test_percentile_leaves_the_outliers_out():
    rows = torch.linspace(0, 1, 20001).repeat(2, 1)
    rows[1, 5] = 1e6
    step, zero = ranges.percentile(rows, 8)
    assert step[1].item() == pytest.approx(step[0].item(), rel=1e-3)
    assert zero.tolist() == [0, 0]


def test_shrinking_one_end_alone_pays_where_the_tails_differ():
    x = torch.randn(1, 2**17 + 1, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 30.0
    both = error(x, *ranges.mse(x, 4), 4)
    alone = error(x, *ranges.mse(x, 4, ends=True), 4)
    assert alone.item() < 0.7 * both.item()


def histogram(x, bins=2048):
    width = x.abs().max().item() / bins
    return torch.histc(x.abs(), bins, 0, width * bins).double(), width, x.min().item(), x.max().item()


def test_kl_clips_a_long_tail_and_keeps_a_flat_one():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    x[0] = 40.0
    step, zero = ranges.kl(*histogram(x), bits=8)
    assert zero.item() == 0
    assert step.item() * 255 < 10
    step, _ = ranges.kl(*histogram(torch.linspace(0, 1, 200_001)), bits=8)
    assert step.item() * 255 == pytest.approx(1.0, abs=0.05)


def test_kl_of_both_signs_and_of_nothing():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    step, zero = ranges.kl(*histogram(x), bits=4)
    assert 0 < zero.item() < 15
    assert 0 < step.item() < 1
    step, zero = ranges.kl(torch.zeros(2048), 0.0, 0.0, 0.0, 8)
    assert (step.item(), zero.item()) == (1.0, 0)
