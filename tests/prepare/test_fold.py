"""BatchNorm folding: exact up to rounding, and only where nothing else sees what it changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qk.prepare import prepare
from qk.prepare.fold import folded
from small_nets import Net


def random_norm(kind, channels, **options):
    norm = kind(channels, **options).eval()
    rng = torch.Generator().manual_seed(3)
    for tensor, low, high in ((norm.running_mean, -2, 2), (norm.running_var, 1e-3, 5)):
        tensor.uniform_(low, high, generator=rng)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5, generator=rng)
        nn.init.uniform_(norm.bias, -1, 1, generator=rng)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv2d", "depthwise", "linear"])
def test_a_folded_layer_computes_the_norm_of_the_layer(kind, bias, affine):
    torch.manual_seed(0)
    if kind == "linear":
        layer, norm, x = nn.Linear(19, 7, bias=bias), random_norm(nn.BatchNorm1d, 7, affine=affine), torch.randn(5, 19)
    else:
        groups = 6 if kind == "depthwise" else 1
        layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=bias)
        norm, x = random_norm(nn.BatchNorm2d, 6, affine=affine), torch.randn(2, 6, 5, 7)
    model = nn.Sequential(layer, norm).eval()
    p = prepare(model, x)
    assert p.folds == {"1": "0"}
    assert isinstance(p.model[1], nn.Identity)
    with torch.no_grad():
        ours, exact = p.model(x), model.double()(x.double())
        model.float()
        # Each weight and the bias are rounded once, and K products and a bias are summed: (K + 2) roundings of 2^-24
        # relative to the sum of magnitudes.
        weight, shift = folded(layer.weight, layer.bias, norm)
        operation = F.linear if kind == "linear" else lambda *a: F.conv2d(*a, padding=1, groups=groups)
        magnitude = operation(x.abs().double(), weight.abs().double(), shift.abs().double())
    assert ((ours - exact).abs() <= (layer.weight[0].numel() + 2) * 2**-24 * magnitude).all()


def net(wiring, norm=None):
    parts = {"conv": nn.Conv2d(3, 4, 3), "conv2": nn.Conv2d(3, 4, 3), "norm": norm or random_norm(nn.BatchNorm2d, 4)}
    return Net(wiring, **parts, head=nn.Conv2d(4, 2, 1)).eval()


WIRINGS = {
    "a residual around the norm": lambda m, x: m.head(m.norm(y := m.conv(x)) + y),
    "the layer's output is returned": lambda m, x: (m.head(m.norm(y := m.conv(x))), y),
    "the layer's output is returned in a dict": lambda m, x: {"a": (y := m.conv(x)), "b": m.head(m.norm(y))},
    "a functional op between": lambda m, x: m.head(m.norm(F.relu(m.conv(x)))),
    "an in-place op between": lambda m, x: m.head(m.norm(F.relu(m.conv(x), inplace=True))),
    "a sum in front": lambda m, x: m.head(m.norm(m.conv(x) + m.conv2(x))),
    "the norm serves two layers": lambda m, x: m.head(m.norm(m.conv(x)) + m.norm(m.conv2(x))),
    "the layer runs twice": lambda m, x: m.head(m.norm(m.conv(x)) + m.conv(x.flip(-1))),
    "a reader behind a view": lambda m, x: m.head(m.norm(y := m.conv(x)) * y.flatten(2).mean()),
    "the norm's output is shifted by the layer's weight": lambda m, x: m.head(m.norm(m.conv(x)) + m.conv.weight.sum()),
}


@pytest.mark.parametrize("case", WIRINGS)
def test_no_norm_is_folded_where(case):
    model, x = net(WIRINGS[case]), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    p = prepare(model, x)
    assert p.folds == {}
    assert p.kept["norm"].startswith("BatchNorm2d was not folded: ")
    with torch.no_grad():
        ours, theirs = p.model(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_norm_without_running_statistics_stays():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    p = prepare(net(lambda m, x: m.head(m.norm(m.conv(x))), norm), torch.randn(2, 3, 6, 6))
    assert p.kept["norm"] == "BatchNorm2d was not folded: it has no running statistics"


def test_a_norm_with_its_own_forward_stays():
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    p = prepare(net(lambda m, x: m.head(m.norm(m.conv(x))), NormAndReLU(4)), torch.randn(2, 3, 6, 6))
    assert p.kept["norm"] == "NormAndReLU was not folded: it has its own forward"


def test_a_norm_over_another_axis_than_the_features_stays():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    p = prepare(model, torch.randn(2, 4, 5))
    assert p.kept["1"] == "BatchNorm1d was not folded: its channels are not the layer's last axis"


def test_a_folded_norm_that_the_model_reaches_by_another_reference_does_nothing():
    norm = random_norm(nn.BatchNorm2d, 4)
    model = Net(lambda m, x: m.refs[0](m.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=norm, refs=[norm]).eval()
    x = torch.randn(2, 3, 6, 6)
    p = prepare(model, x)
    assert p.folds == {"norm": "conv"}
    with torch.no_grad():
        torch.testing.assert_close(p.model(x), model(x))


def test_a_norm_in_front_of_an_in_place_relu_folds():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    p = prepare(model, x)
    assert p.folds == {"1": "0"}
    with torch.no_grad():
        torch.testing.assert_close(p.model(x), model(x))
