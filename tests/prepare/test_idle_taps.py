"""Taps that meet padding alone are left out, and nothing else: the convolution gives what it gave."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from qk.prepare.insert import without_idle_taps

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("taps", "stride", "padding"), list(product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2, 3))))
def test_the_convolution_stays(taps, stride, padding):
    weight = torch.randn(4, 3, taps, taps, generator=torch.Generator().manual_seed(taps), dtype=torch.float64)
    for dilation, height, width in product((1, 2), (1, 2, 3, 6), (1, 4)):
        if min(height, width) + 2 * padding <= dilation * (taps - 1):
            continue  # torch has no output for it
        x = X[..., :height, :width]
        args = {"stride": (stride, stride), "dilation": (dilation, dilation), "padding": (padding, padding)}
        found, left = without_idle_taps(weight, (height, width), **args, groups=1)
        torch.testing.assert_close(F.conv2d(x, found, **(args | {"padding": left})), F.conv2d(x, weight, **args))


def test_on_one_pixel_the_middle_is_left():
    weight = torch.randn(4, 3, 3, 3)
    found, left = without_idle_taps(weight, (1, 1), (1, 1), (1, 1), (1, 1))
    assert torch.equal(found, weight[..., 1:2, 1:2])
    assert left == (0, 0)
    found, left = without_idle_taps(weight, (2, 5), (1, 1), (2, 2), (1, 1))  # rows -1 to 1: the first meets padding
    assert torch.equal(found, weight[..., 1:, :])
    assert left == (0, 1)
