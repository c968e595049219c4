"""GPTQ's mathematics: closed forms, and small problems solved by trying everything."""

import itertools

import pytest
import torch

from qk import ops
from qk.methods.gptq import inverse_factor, round_columns, row_losses, solve

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(groups=1, rows=5, columns=11, bits=3, seed=0, positions=40):
    """weight, correlated hessian, step and zero of each weight (affine, of a row), bits."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, rows, columns, generator=rng)
    mix = torch.randn(groups, columns, columns, generator=rng) / columns**0.5 + 0.5
    x = (mix @ torch.randn(groups, columns, positions, generator=rng)).double()
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    step = 0.8 * (high - low) / (2**bits - 1)
    zero = torch.round(-0.8 * low / step)
    each = lambda t: t[..., None].expand_as(weight).contiguous()  # noqa: E731
    return weight.double(), x @ x.transpose(1, 2), each(step), each(zero), bits


def values(codes, step, zero):
    return ((codes.float() - zero) * step).double()


def nearest(weight, step, zero, bits):
    groups, rows, _ = weight.shape
    flat = [t[..., 0].reshape(groups * rows) for t in (step, zero)]
    codes = ops.quantize(weight.float().reshape(groups * rows, -1), flat[0], flat[1].to(torch.int32), bits)
    return codes.reshape(weight.shape)


def loss(codes, weight, hessian, step, zero):
    return row_losses(values(codes, step, zero) - weight, hessian)


def test_the_factor_is_that_of_the_damped_inverse():
    _, hessian, *_ = problem(groups=3)
    u = inverse_factor(hessian, damping=0.25)
    damped = hessian + torch.diag_embed(0.25 * hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(3, 11))
    assert torch.equal(u, u.triu())
    # Condition below 11 / 0.25 + 1: about 45 times the roundings of K products in float64.
    torch.testing.assert_close(
        u.transpose(1, 2) @ u @ damped, torch.eye(11).double().expand(3, 11, 11), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_for_a_diagonal_hessian_it_is_nearest_rounding(bits, act_order):
    weight, hessian, step, zero, bits = problem(groups=2, columns=300, bits=bits)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    assert torch.equal(solve(weight, diagonal, step, zero, bits, act_order), nearest(weight, step, zero, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_loses_less_than_nearest_rounding(bits, act_order):
    for seed in range(5):
        weight, hessian, step, zero, _ = problem(rows=16, columns=64, bits=bits, seed=seed, positions=200)
        ours = loss(solve(weight, hessian, step, zero, bits, act_order), weight, hessian, step, zero).sum()
        assert ours < 0.8 * loss(nearest(weight, step, zero, bits), weight, hessian, step, zero).sum()


@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_between_the_best_there_is_and_nearest_rounding(act_order):
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(6):
        weight, hessian, step, zero, bits = problem(rows=40, columns=4, bits=2, seed=seed)
        every = torch.tensor(list(itertools.product(range(4), repeat=4)))[:, None]  # [256, 1, 4]
        one = lambda t: t.expand(256, 40, 4)  # noqa: E731
        best = loss(one(every), one(weight), hessian, one(step), one(zero)).amin(0, keepdim=True)
        ours = loss(solve(weight, hessian, step, zero, bits, act_order), weight, hessian, step, zero)
        assert (ours >= best * (1 - 1e-12)).all()
        rounded = loss(nearest(weight, step, zero, bits), weight, hessian, step, zero)
        totals += torch.stack([best.sum(), ours.sum(), rounded.sum()])
    # Half of the way from nearest rounding to the best, in four columns of which the last cannot be made up for.
    assert totals[1] < (totals[0] + totals[2]) / 2


def test_two_columns_by_hand():
    # H = [[2, 1], [1, 2]]: an error of -0.4 in the first weight is made up for best by 0.4 * 1 / 2 more in the second.
    hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]).double()
    weight = torch.tensor([[[0.4, 0.35]]]).double()
    step, zero = torch.ones(1, 1, 2), torch.full((1, 1, 2), 4.0)
    codes = round_columns(weight, inverse_factor(hessian, damping=0.0), step, zero, 4)
    assert codes.tolist() == [[[4, 5]]]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_lazy_updates_change_nothing(block):
    weight, hessian, step, zero, bits = problem(groups=2, columns=67)
    u = inverse_factor(hessian)
    assert torch.equal(round_columns(weight, u, step, zero, bits, block), round_columns(weight, u, step, zero, bits, 1))


def test_with_act_order_the_order_of_columns_does_not_matter():
    weight, hessian, step, zero, bits = problem(groups=2, columns=19)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    moved = solve(weight[..., order], hessian[:, order][:, :, order], step, zero, bits, True)
    assert torch.equal(moved, solve(weight, hessian, step, zero, bits, True)[..., order])


def test_groups_and_rows_are_solved_as_if_alone():
    weight, hessian, step, zero, bits = problem(groups=3, rows=4)
    whole = solve(weight, hessian, step, zero, bits, True)
    for g, row in itertools.product(range(3), range(4)):
        one = [t[g : g + 1, row : row + 1] for t in (weight, step, zero)]
        assert torch.equal(solve(one[0], hessian[g : g + 1], *one[1:], bits, True), whole[g : g + 1, row : row + 1])


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_without_input_are_rounded_to_the_nearest_and_move_no_other(act_order):
    weight, hessian, step, zero, bits = problem(columns=12)
    alive = torch.tensor([i for i in range(12) if i not in (0, 5, 11)])
    dead = hessian.clone()
    for i in (0, 5, 11):
        dead[:, i] = dead[:, :, i] = 0
    codes = solve(weight, dead, step, zero, bits, act_order)
    assert torch.equal(codes[..., [0, 5, 11]], nearest(weight, step, zero, bits)[..., [0, 5, 11]])
    # The damping is a share of the mean over all columns, so alone the others need the share that makes it equal.
    if not act_order:
        alone = inverse_factor(dead[:, alive][:, :, alive], damping=0.01 * 9 / 12)
        kept = [t[..., alive].contiguous() for t in (weight, step, zero)]
        assert torch.equal(round_columns(kept[0], alone, *kept[1:], bits), codes[..., alive])
    assert torch.equal(solve(weight, dead * 0, step, zero, bits, act_order), nearest(weight, step, zero, bits))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_what_it_is_given_stays(rows, act_order):
    given = problem(groups=2, rows=rows)
    before = [t.clone() for t in given[:4]]
    solve(*given, act_order)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=False))


def test_ends_of_the_codes_hold():
    weight, hessian, step, zero, bits = problem(bits=2)
    codes = solve(100 * weight, hessian, step, zero, bits, False)
    assert int(codes.max()) <= 3
