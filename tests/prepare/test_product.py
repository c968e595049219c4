"""Products of rounded factors: which layers have them, and how far they are from those of float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qk.prepare.product import pays, product

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_it_is_the_product_of_the_rounded_factors(kind, with_bias):
    x, weight, args = drawn(8, 64, 16, 16), drawn(160, 64, 3, 3), CONV
    if kind == "linear":
        x, weight, args = drawn(8, 128, 320), drawn(320, 320), None
    assert pays(x, weight, args)
    bias = drawn(len(weight)) if with_bias else None
    found = product(x, weight, bias, args, torch.bfloat16)
    assert found.dtype == torch.float32
    rounded = [t.bfloat16().double() for t in (x, weight)]
    multiply, position = (F.conv2d, (-1, 1, 1)) if args else (F.linear, (-1,))
    expected = multiply(*rounded, **(args or {}))
    # The product is rounded to 8 bits of significand, half a unit of which is 2^-8 of it at most; before, sums of 576
    # or 320 terms in float32 err by less than 576 * 2^-24 of the sum of magnitudes.
    limit = 2**-8 * expected.abs() + 576 * 2**-24 * multiply(*(t.abs() for t in rounded), **(args or {}))
    apart = (found.double() - expected - (bias.view(position) if with_bias else 0)).abs()
    # The bias is added in float32.
    assert (apart <= limit * 1.01 + 2**-22 * (expected.abs() + 5)).all()
    assert not torch.equal(found, product(x, weight, bias, args)), "nothing was rounded"


def test_gradients_have_the_types_and_the_direction_of_the_factors():
    x, weight, bias = drawn(8, 64, 16, 16).requires_grad_(), drawn(160, 64, 3, 3).requires_grad_(), drawn(160)
    slope = drawn(8, 160, 16, 16)
    exact = torch.autograd.grad(product(x, weight, bias, CONV), (x, weight), slope)
    rounded = torch.autograd.grad(product(x, weight, bias, CONV, torch.bfloat16), (x, weight), slope)
    for a, b in zip(exact, rounded, strict=True):
        assert (b.dtype, b.shape) == (torch.float32, a.shape)
        # Three factors and a result with relative errors of at most 2^-9 each, independent of each other.
        assert (a - b).norm() < 2 * 2**-8 * a.norm()


@pytest.mark.parametrize(
    ("x", "weight", "changed", "expected"),
    [
        ((32, 64, 8, 8), (64, 64, 3, 3), {}, True),
        ((32, 512, 2, 2), (512, 512, 3, 3), {}, False),  # more weights than inputs
        ((32, 96, 16, 16), (96, 1, 3, 3), {"groups": 96}, False),
        ((32, 16, 32, 32), (96, 16, 1, 1), {}, False),  # 1x1 of few channels: 14 multiply-adds for a value
        ((32, 64, 8, 8), (128, 64, 1, 1), {"stride": (2, 2)}, False),
        ((0, 64, 8, 8), (64, 64, 3, 3), {}, False),
    ],
)
def test_where_it_pays(x, weight, changed, expected):
    assert pays(torch.empty(x), torch.empty(weight), CONV | changed) is expected


def test_layers_whose_conversion_costs_more_stay_exact():
    layer = nn.Linear(8, 4)
    x = drawn(3, 8)
    assert torch.equal(product(x, layer.weight, layer.bias, None, torch.bfloat16), layer(x))
