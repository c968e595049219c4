"""The mathematics of learned steps: the paper's numbers, gradients, steps that stay positive."""

from __future__ import annotations

import pytest
import torch

from qk.methods.lsq import first_step, middle, positive, top
from qk.ops.lsq import grad_scale_for, reference_backward
from qk.prepare.insert import ActQuantizer


def test_limits_are_the_papers():
    assert [(middle(b), top(b, middle(b))) for b in (2, 3, 4, 8)] == [(2, 1), (4, 3), (8, 7), (128, 127)]
    assert [top(b, 0) for b in (2, 4, 8)] == [3, 15, 255]
    assert top(4, 15) == 1  # no code lies above zero


def test_first_steps_are_the_papers():
    signed = torch.tensor([-1.5, -0.6, -0.2, 0.1, 0.3, 0.9])
    unsigned = torch.tensor([0, 0.05, 0.26, 0.74, 0.76, 1.9])
    assert first_step(signed.abs().mean(), top(2, 2)).item() == pytest.approx(1.2, rel=1e-6)
    assert first_step(unsigned.abs().mean(), top(2, 0)).item() == pytest.approx(0.71398983, rel=1e-6)
    assert first_step(torch.zeros(2), 7).tolist() == [1, 1]


def test_gradient_scales_are_the_papers():
    assert grad_scale_for(6, top(2, 2)) == pytest.approx(0.40824829, rel=1e-7)
    assert grad_scale_for(6, top(2, 0)) == pytest.approx(0.23570226, rel=1e-7)


class Definition(torch.autograd.Function):
    """Forward: s * clamp(v / s + what rounding added), with that taken for a constant, as a straight-through estimator
    does: a function that is smooth off its limits. Backward: the definition's."""

    @staticmethod
    def forward(ctx, v, s, at, zero, bits, boundary):
        ctx.save_for_backward(v, s, zero)
        ctx.bits, ctx.boundary = bits, boundary
        t = at[0] / at[1].unsqueeze(-1)
        added = t.round() - t
        low = -zero.double().unsqueeze(-1)
        high = low + 2**bits - 1
        held = t if boundary == "paper" else t.round()
        inside = (low < t) & (t < high) if boundary == "paper" else (low <= held) & (held <= high)
        limit = torch.where(held <= low, low, high)
        steps = s.unsqueeze(-1)
        return torch.where(inside, v + steps * added, steps * limit)

    @staticmethod
    def backward(ctx, grad):
        v, s, zero = ctx.saved_tensors
        grad_v, grad_s = reference_backward(grad, v, s, zero, ctx.bits, 1.0, ctx.boundary)
        return grad_v, grad_s.double(), None, None, None, None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("boundary", ["paper", "torch"])
def test_the_definitions_gradient_is_that_of_its_straight_through_function(bits, boundary):
    random = torch.Generator().manual_seed(bits)
    v = torch.randn(4, 23, generator=random, dtype=torch.float64).requires_grad_()
    s = (0.2 + torch.rand(4, generator=random, dtype=torch.float64)).requires_grad_()
    zero = torch.tensor([middle(bits), 0, 1, 2**bits - 1], dtype=torch.int32)
    at = v.detach().clone(), s.detach().clone()
    # reference_backward rounds the step's gradient to float32: sums below 2^8 * 23, half an ulp is below 3e-4
    assert torch.autograd.gradcheck(Definition.apply, (v, s, at, zero, bits, boundary), atol=3e-4)


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 7)])
def test_an_activations_step_has_the_papers_gradient(shape):
    """Scaled by 1 / sqrt(features * largest code), the features those of one sample."""
    quantizer = ActQuantizer(4)
    quantizer.set_range(torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32))
    quantizer.step.requires_grad_()
    random = torch.Generator().manual_seed(0)
    x, grad = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    quantizer(x).backward(grad)
    _, wanted = reference_backward(grad.reshape(1, -1), x.reshape(1, -1), torch.tensor([0.1]), quantizer.zero, 4)
    features = x[0].numel()
    torch.testing.assert_close(quantizer.step.grad, wanted.float() / (features * 15) ** 0.5, rtol=1e-5, atol=1e-6)


def test_a_step_is_positive_and_equals_its_parameter():
    raw = torch.tensor([0.3, 1e-20, 7.0, 0.0, -0.2, -1e-38], requires_grad=True)
    step = positive(raw)
    assert torch.equal(step[:3], raw[:3])
    assert (step > 0).all()
    assert (1 / step).isfinite().all()
    step.sum().backward()
    assert raw.grad.tolist() == [1, 1, 1, 0, -1, -1]
