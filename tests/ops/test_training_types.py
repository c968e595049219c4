"""The operators of training on float16 and bfloat16: what they give for the same values in float32, rounded once."""

from importlib import import_module

import pytest
import torch

import qk
from ops.test_lsq import LANE_TERMS

# The names in qk.ops are functions.
lsq, soft_round, fisher_loss = (import_module(f"qk.ops.{name}") for name in ("lsq", "soft_round", "fisher_loss"))
penalty_slope = import_module("qk.ops.rounding_penalty").reference_backward

SHAPES = [(5, 67), (1, 1), (3, 0), (2, 20011), (64, 9)]  # as in test_lsq.py
TYPES = [torch.float16, torch.bfloat16]


def values(shape, dtype, device, seed, scale=1.0):
    """Begins behind one value, so at no boundary of 16 bytes."""
    random = torch.Generator().manual_seed(seed)
    rows, cols = shape
    x = torch.randn(rows * cols + 1, generator=random) * scale
    return x.to(device, dtype)[1:].view(shape)


def scales(rows, bits, device):
    random = torch.Generator().manual_seed(9)
    step = 0.05 + torch.rand(rows, generator=random)
    zero = torch.randint(0, 2**bits, (rows,), generator=random, dtype=torch.int32)
    return step.to(device), zero.to(device)


def same(got, want, dtype):
    assert got.dtype == dtype
    return torch.equal(got, want.to(dtype))


def same_sum(got, want, terms):
    """Each of both is a sum of float32 in an order of its own: on CUDA accesses hold twice as many values."""
    assert got.dtype == torch.float32
    bound = 2 * LANE_TERMS * 2.0**-24 * terms.double().abs().sum() + 1e-30
    return bool(((got.double() - want.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("boundary", ["paper", "torch"])
def test_lsq(boundary, dtype, device):
    for shape in SHAPES:
        x, grad = values(shape, dtype, device, 0), values(shape, dtype, device, 1)
        args = (*scales(shape[0], 4, device), 4)
        assert same(qk.ops.lsq(x, *args), qk.ops.lsq(x.float(), *args), dtype), shape
        got = torch.ops.qk.lsq_backward(grad, x, *args, 0.5, boundary)
        want = torch.ops.qk.lsq_backward(grad.float(), x.float(), *args, 0.5, boundary)
        assert same(got[0], want[0], dtype), shape
        assert same_sum(got[1], want[1], grad * 2**4), shape


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("penalty", [None, (0.3, 5.0)])
def test_soft_round(penalty, dtype, device):
    penalty = None if penalty is None else torch.tensor(penalty, device=device)
    for shape in SHAPES:
        weight, v, grad = (values(shape, dtype, device, seed) for seed in range(3))
        args = (*scales(shape[0], 4, device), 4)
        got, want = qk.ops.soft_round(weight, v, *args), qk.ops.soft_round(weight.float(), v.float(), *args)
        assert same(got, want, dtype), shape
        got = torch.ops.qk.soft_round_backward(grad, weight, v, *args, penalty)
        want = torch.ops.qk.soft_round_backward(grad.float(), weight.float(), v.float(), *args, penalty)
        assert same(got, want, dtype), shape


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_penalty(dtype, device):
    for shape in SHAPES:
        v, grad = values(shape, dtype, device, 0), torch.tensor(0.7, device=device)
        got, want = qk.ops.rounding_penalty(v, 3.0), qk.ops.rounding_penalty(v.float(), 3.0)
        assert same_sum(got, want, torch.ones_like(v)), shape
        got = torch.ops.qk.rounding_penalty_backward(grad, v, 3.0)
        assert same(got, torch.ops.qk.rounding_penalty_backward(grad, v.float(), 3.0), dtype), shape


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_fisher_loss(weighted, dtype, device):
    for shape in SHAPES:
        output, target, weight = (values(shape, dtype, device, seed) for seed in range(3))
        given = (output, target, weight if weighted else None)
        got = torch.ops.qk.fisher_loss(*given, 0.5)
        want = torch.ops.qk.fisher_loss(*(None if t is None else t.float() for t in given), 0.5)
        assert same(got[1], want[1], torch.float32), shape
        terms = (output.double() - target.double()) ** 2 * (weight.double() if weighted else 1)
        assert same_sum(got[0], want[0], terms), shape


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_range_error(power, dtype, device):
    for shape in SHAPES:
        x = values(shape, dtype, device, 0)
        step, zero = scales(shape[0] * 3, 4, device)
        args = (step.view(-1, 3), zero.view(-1, 3), 4, power)
        got, want = qk.ops.range_error(x, *args), qk.ops.range_error(x.float(), *args)
        assert torch.equal(got, want), shape  # values are the same, and so is the order of the sum


@pytest.mark.parametrize("dtype", TYPES)
def test_the_definitions_widen_too(dtype):
    x, grad = values((5, 67), dtype, "cpu", 0), values((5, 67), dtype, "cpu", 1)
    args = (*scales(5, 4, "cpu"), 4)
    assert torch.equal(lsq.reference(x, *args), qk.ops.lsq(x, *args))
    want = torch.ops.qk.lsq_backward(grad, x, *args, 1.0, "paper")
    assert torch.equal(lsq.reference_backward(grad, x, *args)[0], want[0])
    assert torch.equal(fisher_loss.reference(x, grad)[1], torch.ops.qk.fisher_loss(x, grad, None, 1.0)[1])
    for definition, of in ((soft_round.reference, (x, grad, *args)), (penalty_slope, (torch.tensor(0.5), x, 2.0))):
        wide = [t.float() if torch.is_tensor(t) and t.dtype == dtype else t for t in of]
        assert same(definition(*of), definition(*wide), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_have_the_type_of_their_tensors(dtype, device):
    x, target = values((6, 40), dtype, device, 0).requires_grad_(), values((6, 40), dtype, device, 1)
    step, zero = scales(6, 4, device)
    step.requires_grad_()
    loss = qk.ops.fisher_loss(qk.ops.lsq(x, step, zero, 4), target) + qk.ops.rounding_penalty(x, 2.0)
    loss.backward()
    assert (loss.dtype, x.grad.dtype, step.grad.dtype) == (torch.float32, dtype, torch.float32)


def test_a_scaled_loss_of_float16_keeps_its_gradient(device):
    """As GradScaler does: neither the slope, 2e-8, nor the scale, 65536, is one of float16."""
    output = torch.full((4,), 0.51, dtype=torch.float16, device=device, requires_grad=True)
    target = torch.full((4,), 0.5, dtype=torch.float16, device=device)
    (qk.ops.fisher_loss(output, target, scale=2.0**-20) * 65536).backward()
    want = 65536 * 2 * 2.0**-20 * (output.detach().float() - target.float())
    assert torch.equal(output.grad, want.half())


@pytest.mark.parametrize("dtype", TYPES)
def test_registration(dtype, device):
    x, other = values((6, 40), dtype, device, 0), values((6, 40), dtype, device, 1)
    args, q = (*scales(6, 4, device), 4), torch.ops.qk
    candidates = tuple(t.view(6, 1) for t in args[:2])
    calls = {
        q.lsq.default: (x, *args),
        q.lsq_backward.default: (other, x, *args, 1.0, "paper"),
        q.soft_round.default: (x, other, *args),
        q.soft_round_backward.default: (other, x, other, *args),
        q.rounding_penalty.default: (x, 2.0),
        q.rounding_penalty_backward.default: (torch.ones((), device=device), x, 2.0),
        q.fisher_loss.default: (x, other, None, 1.0),
        q.range_error.default: (x, *candidates, 4, 2.0),
    }
    for operator, call in calls.items():
        torch.library.opcheck(operator, call)


def test_mixed_types_are_refused():
    x, half = torch.ones(2, 3), torch.ones(2, 3).half()
    step, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"qk::lsq_backward: grad must be of the type of x, Float \[2, 3\], got Half"
    ):
        torch.ops.qk.lsq_backward(half, x, step, zero, 4, 1.0, "paper")
    with pytest.raises(RuntimeError, match="qk::soft_round: v must be of the type of weight"):
        torch.ops.qk.soft_round(x, half, step, zero, 4)
    with pytest.raises(RuntimeError, match="qk::fisher_loss: weight must be of the type of output"):
        torch.ops.qk.fisher_loss(x, x, half, 1.0)
