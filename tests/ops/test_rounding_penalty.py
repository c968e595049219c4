import math

import pytest
import torch

import qk
from qk.ops.rounding_penalty import reference, reference_backward

SHAPES = [(5, 67), (1,), (0,), (3, 20011), ()]


def problem(shape, device="cpu"):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2).to(device)


def term_error(beta):
    """Of 1 - |u|^beta: u is within 5 * 2^-24, the power within (4 + beta |log2 u|) 2^-23 of itself, and
    |u|^beta |log2 u| beta is at most 1 / (e ln 2)."""
    return (5 * beta + 2 * (4 + 1 / (math.e * math.log(2))) + 1) * 2.0**-24


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.7, 20.0])
def test_value_is_the_definition(beta, device):
    for shape in SHAPES:
        v = problem(shape, device)
        got, want = qk.ops.rounding_penalty(v, beta), reference(v.double(), beta)
        assert got.shape == ()
        # Besides the terms' own errors: a lane adds 8192 / 16 of them, each addition within half an ulp of the sum.
        bound = v.numel() * term_error(beta) + (8192 / 16 + 16) * 2.0**-24 * want
        assert (got.double() - want).abs() <= bound, shape


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.7, 20.0])
def test_gradient_is_the_definition(beta, device):
    for shape in SHAPES:
        v = problem(shape, device).requires_grad_()
        (got,) = torch.autograd.grad(qk.ops.rounding_penalty(v, beta) * 0.5, v)
        want = reference_backward(torch.tensor(0.5, device=device, dtype=torch.float64), v.detach().double(), beta)
        h = 1.2 * torch.sigmoid(v.detach().double()) - 0.1
        edges = torch.minimum(h.abs(), (h - 1).abs()) < 2.0**-22  # the last bit of h decides there
        # |u|^(beta - 1) has the error of a power; near 0 and beta = 1 only the sign of u is left.
        bound = 0.6 * beta * max(1, beta) * 2 * term_error(beta)
        assert (((got - want).abs() <= bound) | edges | ((h - 0.5).abs() < 2.0**-22)).all(), shape


def test_the_definitions_gradient_is_its_autograd():
    v = problem((5, 67)).double().requires_grad_()
    (want,) = torch.autograd.grad(reference(v, 3.7), v)
    torch.testing.assert_close(reference_backward(torch.ones(()), v.detach(), 3.7), want)


@pytest.mark.parametrize("beta", [2.0, 3.7, 20.0])
def test_the_definitions_gradient_is_that_of_the_definition(beta):
    class Definition(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            return reference(v, beta)

        @staticmethod
        def backward(ctx, grad):
            return reference_backward(grad, *ctx.saved_tensors, beta)

    assert torch.autograd.gradcheck(Definition.apply, problem((5, 17)).double().requires_grad_())


@pytest.mark.parametrize(("beta", "penalty"), [(20, 4.834752), (11, 4.625453), (2, 3.463353)])
def test_worked_numbers(beta, penalty, device):
    v = torch.tensor([-3, -2.397895, -1, 0, 0.5, 1, 2, 2.397895, 3], device=device)
    assert qk.ops.rounding_penalty(v, beta).item() == pytest.approx(penalty, abs=9 * term_error(beta))


def test_it_is_zero_once_all_is_decided_and_one_for_each_open_value(device):
    decided = torch.tensor([-3.0, 3.0, torch.inf, -torch.inf, 100.0], device=device).requires_grad_()
    penalty = qk.ops.rounding_penalty(decided, 2.0)
    assert penalty.item() == 0
    assert torch.autograd.grad(penalty, decided)[0].tolist() == [0] * 5
    undecided = torch.zeros(1000, device=device, requires_grad=True)
    penalty = qk.ops.rounding_penalty(undecided, 2.0)
    assert penalty.item() == 1000
    assert (torch.autograd.grad(penalty, undecided)[0] == 0).all()


def test_nan_shows(device):
    v = torch.tensor([0.0, torch.nan, 1.0], device=device)
    assert qk.ops.rounding_penalty(v, 2.0).isnan()


def test_strides_do_not_matter(device):
    v, grad = problem((5, 67), device), torch.tensor(0.5, device=device)
    turned = v.t().contiguous().t()
    assert torch.equal(qk.ops.rounding_penalty(turned, 3.0), qk.ops.rounding_penalty(v, 3.0))
    got = torch.ops.qk.rounding_penalty_backward(grad, turned, 3.0)
    assert torch.equal(got, torch.ops.qk.rounding_penalty_backward(grad, v, 3.0))


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads):
    v, grad = problem((300_007,)), torch.tensor(0.5)
    each_isa_and_threads(
        lambda: (
            qk.ops.rounding_penalty(v, 4.4).reshape(1),
            torch.ops.qk.rounding_penalty_backward(grad, v, 4.4),
        )
    )


def test_registration(device):
    v = problem((5, 67), device)
    torch.library.opcheck(torch.ops.qk.rounding_penalty_backward.default, (torch.ones((), device=device), v, 3.0))
    torch.library.opcheck(torch.ops.qk.rounding_penalty.default, (v.requires_grad_(), 3.0))


@pytest.mark.parametrize(
    ("v", "beta", "message"),
    [
        (
            torch.ones(3).double(),
            2.0,
            r"qk::rounding_penalty: v must be float32, float16 or bfloat16, got Double \[3\]",
        ),
        (torch.ones(3), 0.5, r"beta must be a number of at least 1, finite in float32, got 0.5"),
        (torch.ones(3), math.nan, r"beta must be a number of at least 1, finite in float32, got nan"),
        (torch.ones(3), math.inf, r"beta must be a number of at least 1, finite in float32, got inf"),
        (torch.ones(3), 1e39, r"beta must be a number of at least 1, finite in float32, got 1e\+39"),
    ],
)
def test_bad_input_is_refused(v, beta, message):
    with pytest.raises(RuntimeError, match=message):
        qk.ops.rounding_penalty(v, beta)


def test_gradient_that_is_not_one_value_is_refused():
    with pytest.raises(
        RuntimeError, match=r"rounding_penalty_backward: grad must be one float32 value, got Float \[3\]"
    ):
        torch.ops.qk.rounding_penalty_backward(torch.ones(3), torch.ones(3), 2.0)
