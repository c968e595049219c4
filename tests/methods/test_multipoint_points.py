"""Multipoint's mathematics: points are the paper's, steps are fitted, and channels are chosen by what they lose."""

import itertools

import pytest
import torch

from qk.calibrate.moments import SecondMoments
from qk.methods.multipoint import (
    Candidates,
    best_step,
    by_power,
    candidates,
    decompose,
    error_of,
    grid_step,
    left_after,
    nearest,
    refit,
    spread,
    top_of,
)

SEARCHES = [best_step, grid_step]


def rows(n=7, k=19, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def lengths(left):
    return left.norm(dim=2)


# --- decomposition ----------------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_two_bits():
    w = torch.tensor([[1.0, 0.4, -0.3, 0.05]])
    for search in SEARCHES:
        codes, steps = decompose(w, 2, 3, search)
        assert codes[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, -1, 0], [0, 1, 1, 1]]
        torch.testing.assert_close(steps[:, 0], torch.tensor([1.0, 0.35, 0.05]), rtol=1e-6, atol=0)
        # The last is 0 but for the rounding of steps to float32.
        expected = torch.tensor([[1.1191515], [0.50249378], [0.08660254], [0.0]], dtype=torch.float64)
        torch.testing.assert_close(lengths(left_after(w, codes, steps)), expected, rtol=1e-6, atol=1e-7)


def test_the_worked_numbers_of_three_bits():
    w = torch.tensor([[1.0, 0.4, -0.3, 0.05]])
    codes, steps = decompose(w, 3, 3, grid_step)
    assert codes[:, 0].tolist() == [[3, 1, -1, 0], [0, 3, 2, 2], [-1, 0, -1, 1]]
    torch.testing.assert_close(3 * steps[:, 0], torch.tensor([1.008, 0.06432, 0.022008]), rtol=1e-5, atol=0)
    found = lengths(left_after(w, codes, steps))[1:, 0]
    torch.testing.assert_close(found[:2], torch.tensor([0.0891964, 0.0127331]).double(), rtol=1e-5, atol=0)
    assert found[2].item() == pytest.approx(0.00089, abs=5e-6)  # as many digits as the sheet has
    exact = lengths(left_after(w, *decompose(w, 3, 1)))
    assert exact[1] < found[0]


@pytest.mark.parametrize(("bits", "top"), [(2, 1), (3, 3), (4, 7)])
def test_codes_are_symmetric_and_a_step_too_long_makes_them_zero(bits, top):
    assert top_of(bits) == top
    w = rows(3, 9)
    longest = w.abs().amax(1)
    assert not nearest(w, 2 * top * longest * 1.0001 / top, bits).any()
    assert nearest(w, longest / top, bits).abs().amax(1).tolist() == [top] * 3


@pytest.mark.parametrize("bits", [2, 3])
def test_the_exact_step_is_the_best_of_all_codes(bits):
    w = rows(5, 5, seed=bits).double()
    w[0, 1], w[1] = w[0, 0], torch.tensor([0.0, 0.0, 1.0, -1.0, 0.5])  # ties, zeros
    every = torch.tensor(list(itertools.product(range(-top_of(bits), top_of(bits) + 1), repeat=5))).double()
    gain = (w @ every.T).clamp(min=0).square() / every.square().sum(1).clamp(min=1)
    expected = w.square().sum(1) - gain.amax(1)
    step = best_step(w, bits)
    found = (w - step[:, None] * nearest(w, step, bits)).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_exact_step_is_never_worse_than_the_grids(bits):
    w = rows(11, 37).double()
    errors = [(w - s[:, None] * nearest(w, s, bits)).square().sum(1) for s in (f(w, bits) for f in SEARCHES)]
    assert bool((errors[0] <= errors[1] + 1e-12).all())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_point_leaves_less_until_nothing_is_left(bits, search):
    codes, steps = decompose(rows(), bits, 3, search)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == top_of(bits)
    assert bool((steps > 0).all())
    assert bool((lengths(left_after(rows(), codes, steps)).diff(dim=0) < 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nothing_is_added_to_a_row_that_is_met(bits):
    ended = torch.tensor([[4.0, -4.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    codes, steps = decompose(ended, bits, 3)
    assert not left_after(ended, codes, steps)[1].any()
    assert not codes[1:].any()
    assert steps[1:].unique().tolist() == [1.0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_and_sign_of_a_row_are_those_of_its_points(bits):
    codes, steps = decompose(rows(), bits, 3)
    assert torch.equal(decompose(rows() * 0.25, bits, 3)[0], codes)  # a power of two, so no rounding differs
    assert torch.equal(decompose(rows() * 0.25, bits, 3)[1], steps * 0.25)
    assert torch.equal(decompose(-rows(), bits, 3)[0], -codes)
    assert torch.equal(decompose(-rows(), bits, 3)[1], steps)


def test_a_row_does_not_depend_on_the_others():
    codes, steps = decompose(rows(), 4, 3)
    alone = decompose(rows()[2:3], 4, 3)
    assert torch.equal(alone[0], codes[:, 2:3])
    assert torch.equal(alone[1], steps[:, 2:3])


def test_the_error_falls_exponentially():
    codes, steps = decompose(rows(64, 200), 3, 3)
    left = lengths(left_after(rows(64, 200), codes, steps)).mean(1)
    assert bool((left[1:] < 0.5 * left[:-1]).all())


# --- steps fitted together --------------------------------------------------------------------------------------------


def moments_of(x, groups=1):
    moments = SecondMoments("", groups, x.shape[-1], 10**9)
    moments.add(x.reshape(groups, -1, x.shape[-1]))
    return moments


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_fit_is_that_of_least_squares(count):
    x, w = rows(40, 19, seed=1), rows()
    codes, steps = decompose(w, 3, 3)
    products = moments_of(x).between(left_after(w, codes, steps))
    factors = refit(products, count)
    errors = error_of(products, factors)
    for c in range(len(w)):
        points = (steps[:count, c, None] * codes[:count, c]).double()
        outputs, target = x.double() @ points.T, x.double() @ w[c].double()
        expected = torch.linalg.lstsq(outputs, target[:, None]).solution.flatten()
        # The products are float32 sums over 40 rows; least squares amplifies that by the points' condition, below 100.
        torch.testing.assert_close(factors[c], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(errors[c], (outputs @ expected - target).square().mean(), rtol=1e-3, atol=1e-9)


def test_equal_points_and_empty_ones_are_fitted_as_one():
    w = torch.tensor([[2.0, 4.0, -2.0]])
    codes = torch.tensor([[[1, 2, -1]], [[1, 2, -1]], [[0, 0, 0]]], dtype=torch.int8)
    left = left_after(w, codes, torch.tensor([[1.0], [0.5], [1.0]]))
    products = left.transpose(0, 1) @ left.permute(1, 2, 0)
    factors = refit(products, 3)
    assert error_of(products, factors).item() == pytest.approx(0, abs=1e-10)


def test_a_fit_that_would_turn_a_point_around_is_left_out():
    w = torch.tensor([[1.0, 1.0]])
    codes = torch.tensor([[[1, 0]], [[0, 1]]], dtype=torch.int8)
    x = torch.tensor([[1.0, 1.5], [1.0, 1.5], [-1.0, 0.5]])
    left = left_after(w, codes, torch.tensor([[3.0], [1.0]]))
    products = torch.einsum("vnk,mk,ml,wnl->nvw", left, x.double(), x.double(), left)
    assert refit(products, 1).item() > 0
    turned = products.clone()
    turned[:, 0, 1:] = turned[:, 1:, 0] = 10.0  # as if the rest pointed along the row
    assert refit(turned, 1).tolist() == [[1.0]]


def test_more_points_and_a_fit_never_raise_the_error_of_the_output():
    moments, w = moments_of(rows(200, 19, seed=1) + 0.5), rows(30, 19)
    found = {fit: candidates(w, 2, 3, moments, fit=fit) for fit in ("none", "weights", "outputs")}
    assert bool((found["outputs"].errors.diff(dim=0) <= 0).all())
    assert bool((found["outputs"].errors <= found["none"].errors * (1 + 1e-6)).all())
    assert torch.equal(found["none"].codes, found["outputs"].codes)
    for n in range(1, 4):  # of the weight itself
        left = [left_after(w, c.codes[:n], c.steps[n - 1, :n])[n].norm(dim=1) for c in found.values()]
        assert bool((left[1] <= left[0] * (1 + 1e-6)).all())


def test_errors_are_those_of_the_outputs():
    x, w = rows(50, 19, seed=1), rows()
    found = candidates(w, 3, 2, moments_of(x))
    for n in (1, 2):
        values = (found.steps[n - 1, :n, :, None] * found.codes[:n]).double().sum(0)
        expected = (x.double() @ (w - values).T).square().mean(0)
        torch.testing.assert_close(found.errors[n - 1], expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.power, (x.double() @ w.double().T).square().mean(0), rtol=1e-5, atol=0)


# --- which channels ---------------------------------------------------------------------------------------------------


def layer_of(errors, power):
    errors = torch.tensor(errors).double().T
    return Candidates(torch.empty(0), torch.empty(0), errors, torch.tensor(power).double())


def test_rows_go_where_they_take_off_most_for_their_cost():
    one = layer_of([[8, 3, 1], [6, 5, 4.9]], [50, 50])  # gains 5, 2 and 1, 0.1 in percent
    two = layer_of([[80, 70, 70], [20, 20, 20]], [500, 500])  # gains 1, 0 and 0, 0
    chosen = [
        (1.0, [[2, 1], [1, 1]]),
        (2.5, [[3, 1], [1, 1]]),
        (3.5, [[3, 2], [1, 1]]),  # 1 for a cost of 1, before two's 1 for a cost of 2
        (5.5, [[3, 2], [2, 1]]),
        (1e9, [[3, 3], [2, 1]]),
    ]
    for budget, expected in chosen:
        assert [c.tolist() for c in spread([one, two], [1.0, 2.0], by_power([one, two]), budget=budget)] == expected


def test_what_is_too_dear_leaves_the_budget_to_the_rest():
    dear, cheap = layer_of([[9, 0]], [10]), layer_of([[1, 0]], [10])
    assert [c.tolist() for c in spread([dear, cheap], [5.0, 1.0], by_power([dear, cheap]), budget=2.0)] == [[1], [2]]


def test_channels_get_points_until_their_error_is_small_enough():
    layer = layer_of([[8, 3, 1], [0.4, 0.1, 0], [3, 0.5, 0.1], [0, 0, 0]], [10, 10, 10, 0])
    assert spread([layer], [1.0], [1.0], error=0.05)[0].tolist() == [3, 1, 2, 1]
    assert spread([layer], [1.0], [1.0], error=0.05, budget=2)[0].tolist() == [2, 1, 2, 1]


def test_a_weight_sends_rows_to_what_matters():
    one, two = layer_of([[8, 0]], [10]), layer_of([[9, 0]], [10])
    assert [c.tolist() for c in spread([one, two], [1.0, 1.0], [2.0, 1.0], budget=1.0)] == [[2], [1]]
    assert [c.tolist() for c in spread([one, two], [1.0, 1.0], [1.0, 0.0], budget=9.0)] == [[2], [1]]


def test_a_point_that_raises_the_error_is_not_taken():
    assert spread([layer_of([[1, 2, 0]], [10])], [1.0], [1.0])[0].tolist() == [1]
