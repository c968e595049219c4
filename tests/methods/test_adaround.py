"""The mathematics of learned rounding."""

import pytest
import torch
from torch import nn

from qk import ops
from qk.calibrate import weight_range
from qk.methods.adaround import Rounding, beta, start
from qk.prepare.insert import ActQuantizer, QuantLayer, from_kernel_order
from qk.spec import QuantSpec


def quant_layer(layer, **spec):
    torch.manual_seed(0)
    layer.reset_parameters()
    found = QuantLayer(layer, QuantSpec(**{"weights": 4, "activations": 8, **spec}), ActQuantizer(8))
    found.set_weight_range(*weight_range(found, "mse"))
    return found


def test_learning_starts_at_the_worked_numbers():
    v = start(torch.tensor([0.83, -0.37, 0.05, -1.1, 0.5]), torch.tensor([0.25]))
    expected = torch.tensor([-0.619039, 0.066691, -1.098612, 0.336472, -2.397895])
    torch.testing.assert_close(v, expected, atol=2e-6, rtol=0)


def test_learning_ends_at_the_worked_numbers():
    """The sheet's row in a layer of 4 bits with step 0.25: floors, fractions, and codes by the sign of v."""
    row = torch.tensor([[0.83, -0.37, 0.05, -1.1, 0.5]])
    found = quant_layer(nn.Linear(5, 1, bias=False))
    with torch.no_grad():
        found.weight.copy_(row)
    found.weight_step.fill_(0.25)
    found.weight_zero.fill_(8)
    rounding = Rounding(found)
    assert (rounding.codes().int() - 8).tolist() == [[3, -1, 0, -4, 2]]
    with torch.no_grad():
        fractions = 1.2 * torch.sigmoid(rounding.v) - 0.1
        torch.testing.assert_close(fractions.reshape(-1), torch.tensor([0.32, 0.52, 0.2, 0.6, 0.0]), atol=2e-6, rtol=0)
        rounding.v.fill_(-3)
    assert (rounding.codes().int() - 8).tolist() == [[3, -2, 0, -5, 2]]


def test_beta_falls_linearly_after_the_warmup():
    values = [beta(i, 20000, 0.2, (20.0, 2.0)) for i in (0, 4000, 8000, 12000, 16000, 20000)]
    assert values == pytest.approx([20, 20, 15.5, 11, 6.5, 2])


@pytest.mark.parametrize(
    ("layer", "spec"),
    [
        (nn.Conv2d(6, 5, 3), {}),
        (nn.Conv2d(6, 6, 3, groups=6), {"weights": 2}),
        (nn.Conv2d(6, 5, 3), {"group_size": 18}),
        (nn.Linear(24, 7), {"weights": 8}),
        (nn.Linear(24, 7), {"group_size": 8, "weights": 3}),
    ],
)
def test_nothing_moves_before_learning_and_the_codes_are_the_nearest(layer, spec):
    found = quant_layer(layer, **spec)
    rounding = Rounding(found)
    nearest = found.quantized_weight()
    soft = rounding.soft()
    assert soft.shape == found.weight.shape
    clipped = (found.codes == 0) | (found.codes == 2**found.spec.weights - 1)
    inside = ~from_kernel_order(clipped)
    assert inside.any()
    torch.testing.assert_close(soft[inside], found.weight[inside], atol=1e-6, rtol=1e-5)
    codes = rounding.codes()
    assert codes.shape == found.codes.shape
    # A weight within a rounding error of the middle between two codes may go either way.
    assert (codes != found.codes).sum() <= 1
    assert nearest.shape == soft.shape


def test_hard_codes_follow_the_sign_of_v():
    found = quant_layer(nn.Linear(24, 7))
    rounding = Rounding(found)
    floor = torch.floor(found.weight / found.weight_step[:, None]) + found.weight_zero[:, None]
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            rounding.v.fill_(0.0 if sign > 0 else -1e-6)
        expected = (floor + (sign > 0)).clamp(0, 15)
        assert (rounding.codes().float() - expected).abs().max() <= 1
        assert (rounding.codes().float() == expected).float().mean() > 0.95  # floors of a quotient, not of a product


def test_the_gradient_reaches_v_in_either_layout():
    for spec in ({}, {"group_size": 18}):
        rounding = Rounding(quant_layer(nn.Conv2d(6, 5, 3), **spec))
        rounding.soft().square().sum().backward()
        assert rounding.v.grad.shape == rounding.v.shape
        assert (rounding.v.grad != 0).any()
        by_autograd = rounding.v.grad + torch.ops.qk.rounding_penalty_backward(torch.tensor(0.1), rounding.v, 3.0)
        rounding.begin()
        rounding.value.square().sum().backward()
        rounding.end(torch.tensor([0.1, 3.0]))
        assert torch.equal(rounding.v.grad, by_autograd)
        assert ops.rounding_penalty(rounding.v, 2.0) > 0
